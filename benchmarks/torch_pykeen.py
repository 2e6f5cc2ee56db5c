"""In: a public set, and the configuration of an embedding. Out: PyKEEN's speed and test metrics with the same settings.

The same model, width, epochs, batch, learning rate and optimiser. What the library scores against all entities, PyKEEN
trains by its local closed world assumption with inverse triples, binary cross-entropy and label smoothing; what it
learns from negatives, by sampling them with the self-adversarial loss.
"""

import time

import torch
from pykeen.datasets import get_dataset
from pykeen.evaluation import RankBasedEvaluator
from pykeen.losses import BCEWithLogitsLoss, NSSALoss
from pykeen.models import ComplEx, DistMult, RotatE, TransE, TuckER
from pykeen.training import LCWATrainingLoop, SLCWATrainingLoop

from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.urban_graph.scorers import scorer


def pykeen_run(name: str, config: EmbeddingConfig, seed: int) -> tuple[float, dict[str, float]]:
    """Trains PyKEEN's model of the same name.

    Args:
      name: of the public set.
      config: the library's own configuration.
      seed: of the model and of the batches.

    Returns:
      Training triples per second, and filtered MRR and Hits@k of the test set.
    """
    one_to_all = scorer(config.model).scores_all
    data = get_dataset(dataset=name, dataset_kwargs={"create_inverse_triples": one_to_all})
    loss = (
        BCEWithLogitsLoss()
        if one_to_all
        else NSSALoss(margin=config.margin, adversarial_temperature=config.temperature)
    )
    shared = {"triples_factory": data.training, "loss": loss, "random_seed": seed}
    width = config.width
    if config.model == "tucker":
        dropouts = {"dropout_0": config.dropout, "dropout_1": 0.0, "dropout_2": config.dropout}
        model = TuckER(embedding_dim=width, relation_dim=config.relation_width, **dropouts, **shared)
    elif config.model == "distmult":
        # Its own penalty and unit norm, meant for a ranking loss, drown the cross-entropy: 0.04 instead of 0.6 on UMLS.
        model = DistMult(embedding_dim=width, entity_constrainer=None, regularizer=None, **shared)
    elif config.model == "complex":
        # Its width counts complex numbers. Its own start, of unit size, leaves it at 0.05 on UMLS.
        start = {"entity_initializer": "xavier_uniform", "relation_initializer": "xavier_uniform"}
        model = ComplEx(embedding_dim=width // 2, regularizer=None, **start, **shared)
    elif config.model == "transe":
        model = TransE(embedding_dim=width, scoring_fct_norm=1, **shared)
    else:
        model = RotatE(embedding_dim=width // 2, **shared)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    if one_to_all:
        loop = LCWATrainingLoop(model=model, triples_factory=data.training, optimizer=optimiser)
        choices = {"label_smoothing": config.label_smoothing}
    else:
        sampler = {"num_negs_per_pos": config.negatives}
        loop = SLCWATrainingLoop(
            model=model, triples_factory=data.training, optimizer=optimiser, negative_sampler_kwargs=sampler
        )
        choices = {}
    begin = time.perf_counter()
    loop.train(
        triples_factory=data.training,
        num_epochs=config.epochs,
        batch_size=config.batch,
        sub_batch_size=None,
        use_tqdm=False,
        use_tqdm_batch=False,
        **choices,
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
