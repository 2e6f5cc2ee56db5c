"""In: a public set, and the configuration of an embedding. Out: PyKEEN's speed and test metrics with the same settings.

TuckER of the same width, epochs, batch, learning rate and optimiser, trained by PyKEEN's local closed world assumption
with inverse triples, binary cross-entropy and label smoothing.
"""

import time

import torch
from pykeen.datasets import get_dataset
from pykeen.evaluation import RankBasedEvaluator
from pykeen.losses import BCEWithLogitsLoss
from pykeen.models import TuckER
from pykeen.training import LCWATrainingLoop

from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig


def pykeen_run(name: str, config: EmbeddingConfig, seed: int) -> tuple[float, dict[str, float]]:
    """Trains PyKEEN's TuckER.

    Args:
      name: of the public set.
      config: the library's own configuration.
      seed: of the model and of the batches.

    Returns:
      Training triples per second, and filtered MRR and Hits@k of the test set.
    """
    data = get_dataset(dataset=name, dataset_kwargs={"create_inverse_triples": True})
    model = TuckER(
        embedding_dim=config.width,
        relation_dim=config.relation_width,
        dropout_0=config.dropout,
        dropout_1=0.0,
        dropout_2=config.dropout,
        triples_factory=data.training,
        loss=BCEWithLogitsLoss(),
        random_seed=seed,
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    loop = LCWATrainingLoop(model=model, triples_factory=data.training, optimizer=optimiser)
    begin = time.perf_counter()
    loop.train(
        triples_factory=data.training,
        num_epochs=config.epochs,
        batch_size=config.batch,
        sub_batch_size=None,
        use_tqdm=False,
        use_tqdm_batch=False,
        label_smoothing=config.label_smoothing,
    )
    seconds = time.perf_counter() - begin
    results = RankBasedEvaluator(filtered=True).evaluate(
        model=model,
        mapped_triples=data.testing.mapped_triples,
        additional_filter_triples=[data.training.mapped_triples, data.validation.mapped_triples],
        use_tqdm=False,
    )
    metrics = {"mrr": results.get_metric("both.realistic.inverse_harmonic_mean_rank")}
    metrics |= {f"hits@{k}": results.get_metric(f"both.realistic.hits_at_{k}") for k in (1, 3, 10)}
    return config.epochs * data.training.num_triples / seconds, metrics
