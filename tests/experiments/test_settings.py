"""In: flags of the generator. Out: the configurations that they set, and one line for those that do not go together."""

import dataclasses

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.run_flags import run_main, settings_from_flags
from gpdiff_jax import Settings
from gpdiff_jax.errors import InputError
from gpdiff_jax.zoo.codec import CodecConfig


def _settings(*arguments: str) -> Settings:
    with flagsaver.flagsaver():
        flags.FLAGS(["transfer", "--preset", "tiny", *arguments])
        return settings_from_flags()


def test_flags_of_the_generator_reach_its_configurations_and_nothing_else():
    plain = _settings()
    assert (plain.pretrain.denoiser.conditioning, plain.generate.sampler) == ("adaptive_norm", "ddim")
    assert (plain.pretrain.denoiser.schedule, plain.pretrain.denoiser.objective) == ("cosine", "v")
    changed = _settings(
        *("--conditioning", "post_adaptive", "--schedule", "rectified_flow", "--objective", "flow"),
        *("--functional_by_signal", "--sampler", "euler", "--sampler_steps", "9"),
    )
    denoiser = dataclasses.replace(
        plain.pretrain.denoiser, conditioning="post_adaptive", schedule="rectified_flow", objective="flow"
    )
    pretrain = dataclasses.replace(plain.pretrain, denoiser=denoiser, functional_by_signal=True)
    generate = dataclasses.replace(plain.generate, sampler="euler", steps=9)
    assert changed == dataclasses.replace(plain, pretrain=pretrain, generate=generate)
    half = dataclasses.replace(plain.pretrain.denoiser, dtype="bfloat16")
    pretrain = dataclasses.replace(plain.pretrain, denoiser=half, accumulate=4)
    alike = dataclasses.replace(plain, pretrain=pretrain)
    assert _settings("--dtype=bfloat16", "--accumulate=4") == alike
    weighed = dataclasses.replace(plain.pretrain, min_snr_gamma=5.0)
    assert _settings("--min_snr_gamma", "5") == dataclasses.replace(plain, pretrain=weighed)
    pooled = dataclasses.replace(plain.pooled, averaging=0.9, mixing=0.5)
    assert _settings("--pooled_averaging=.9", "--pooled_mixing=.5") == dataclasses.replace(plain, pooled=pooled)


def test_flags_that_are_not_given_leave_a_preset_as_it_is():
    for preset in ("small", "paper"):
        with flagsaver.flagsaver():
            flags.FLAGS(["transfer", "--preset", preset])
            assert settings_from_flags() == Settings.from_preset(preset)
    with flagsaver.flagsaver():
        flags.FLAGS(["transfer", "--preset", "paper", "--support_days=3", "--protocol=paper", "--damping=0.9,0.5"])
        data = Settings.from_preset("paper").data
        changed = dataclasses.replace(data, support_days=3, protocol="paper", damping=(0.9, 0.5))
        assert settings_from_flags().data == changed


def test_a_half_named_job_on_hosts_is_refused_before_anything_is_read():
    for words, message in (
        (["--num_processes=2"], r"--num_processes \(=2\) needs --coordinator"),
        (["--process_id=1"], r"--process_id \(=1\) needs --coordinator"),
        (["--coordinator=10.0.0.1:80"], "`coordinator` .* needs `num_processes` and `process_id`, or must be auto"),
    ):
        with flagsaver.flagsaver(), pytest.raises(InputError, match=message):
            flags.FLAGS(["transfer", *words])
            run_main(print)([])
    with flagsaver.flagsaver(), pytest.raises(InputError, match="run this on one host, without"):
        flags.FLAGS(["diagnose", "--coordinator=10.0.0.1:80"])
        run_main(print, on_hosts=False)([])


def test_the_rate_of_the_posterior_reaches_its_configuration():
    plain = _settings()
    posterior = dataclasses.replace(plain.posterior, rate=3.0)
    assert _settings("--posterior_rate=3") == dataclasses.replace(plain, posterior=posterior)


def test_window_days_reach_the_data():
    assert _settings().data.window_days is None
    assert _settings("--window_days=1,14").data == dataclasses.replace(_settings().data, window_days=(1, 14))


@pytest.mark.parametrize(("word", "width"), [("64", 64), ("gcd", "gcd")])
def test_flags_of_the_codes_reach_the_codec(word, width):
    plain = _settings()
    assert plain.pretrain.codec == CodecConfig()
    codec = CodecConfig(token_width=width, components=0, normalisation="coordinate")
    changed = _settings("--token_width", word, "--components", "0", "--normalisation", "coordinate")
    assert changed == dataclasses.replace(plain, pretrain=dataclasses.replace(plain.pretrain, codec=codec))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--objective", "eps"), "`objective` 'eps' is undefined where schedule 'cosine' ends without signal"),
        (("--min_snr_gamma", "5", "--functional_by_signal"), "together teach nothing where schedule 'cosine' ends"),
        (("--pooled_averaging", "1"), r"`averaging` of the pooled model must be in \[0, 1\), got 1.0"),
        (("--window_days", "1"), r"--window_days \(=1\) must be two numbers of days, as 1,14"),
        (("--window_days", "3,2"), "`window_days` must be two whole numbers of at least 1 in order, got"),
        (("--accumulate", "3"), r"`accumulate` \(=3\) must divide `batch` \(=8\); change one of them"),
        (("--token_width", "0"), "`token_width` must be at least 1, or 'gcd' for the published rule, got 0"),
        (("--token_width", "wide"), "`token_width` must be at least 1, or 'gcd' for the published rule, got wide"),
        (("--sampler", "euler"), "`sampler` 'euler' needs schedule 'rectified_flow', got 'cosine'"),
        (
            ("--conditioning", "inductive_bias", "--prompts", "temporal"),
            "`conditioning` 'inductive_bias' needs a prompt of .* spatial entries, got temporal entries alone",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_anything_runs(arguments, words):
    with pytest.raises(InputError, match=words):
        _settings(*arguments)


def test_prompts_of_both_parts_go_with_every_strategy():
    for parts in ("statistics", "temporal,spatial"):
        settings = _settings("--conditioning", "inductive_bias", "--prompts", parts)
        assert settings.pretrain.denoiser.conditioning == "inductive_bias"
