"""Does it generate? Measures what the generator draws; writes diagnostics.json and diagnostics.html.

Collapse, memorisation, deafness to the prompt and agreement of samples, on the regions it was trained on, those held
out and the target's support days. The same flags and the same folder as `python -m experiments.transfer`; runs what
comes before where the folder does not hold it.

    python -m experiments.diagnose --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

from absl import flags

from experiments import command_line
from experiments.run_folder import write_json
from experiments.stages import Run, generate_key, stage_main
from gpdiff_jax.analysis.diagnostics import DiagnosticsConfig, ToldTarget, diagnose
from gpdiff_jax.report.diagnostics_page import render_diagnostics

flags.DEFINE_integer("shuffles", 5, "how often prompts are shuffled", 1, 1000)


def show(run: Run) -> None:
    """Measures, writes, and prints what a reader should see first."""
    config = DiagnosticsConfig(generate=run.settings.generate, shuffles=flags.FLAGS.shuffles)
    content = measure(run, config)
    held_out, groups = content["response"]["held_out"], content["groups"]
    print(f"size of generated to harvested: {groups['held_out']['rms'] / groups['held_out']['harvested_rms']:.2f}")
    for name, part in content["response"].items():
        print(f"{name}: error {_text(part['error'])}, with shuffled prompts {_text(part['rise'])} % more")
    print(f"held_out: base {_text(held_out['base'])}, harvested {_text(held_out['harvested'])}")
    print(run.folder / "diagnostics.html")


def measure(run: Run, config: DiagnosticsConfig) -> dict:
    """Diagnoses the generator of a run and leaves diagnostics.json and diagnostics.html in its folder.

    Args:
      run: the run.
      config: sizes.

    Returns:
      What diagnostics.json holds.
    """
    targets = [
        ToldTarget(city.name if len(run.targets) == 1 else city.feature_names[0], target, prompts, generate_key(run, c))
        for c, (city, target, prompts) in enumerate(
            zip(run.target_cities, run.targets, run.target_prompts, strict=True)
        )
    ]
    held_out, key = run.latent_space.held_out, run.key("diagnose")
    found = diagnose(run.zoo, run.hypernetwork, held_out, targets, key=key, config=config)
    settings = run.settings
    content = {
        "target": settings.target or run.target_cities[0].name,
        "unit": ", ".join(dict.fromkeys(city.unit for city in run.target_cities)),
        "seed": settings.seed,
        "covariates": settings.data.covariates,
        **found,
    }
    write_json(run.folder / "diagnostics.json", content)
    render_diagnostics(run.folder)
    return content


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    command_line.run(stage_main(show))
