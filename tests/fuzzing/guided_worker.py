"""Lets a fuzzer that sees which lines of the library an input reaches grow the files that a reader is fed with.

    python -m tests.fuzzing.guided_worker READER FOLDER SECONDS INPUTS SEED

`python -m tests.fuzzing.run --guided` starts it, in a process of its own: the fuzzer (atheris) does not come back. What
it says of itself goes to stderr; the first input that was neither read nor refused in one line is left in the folder as
`crash-...`, with what went wrong in `wrong.txt`.
"""

import pathlib
import random
import sys
import warnings

import atheris  # pyright: ignore[reportMissingImports]  # where there are wheels

with atheris.instrument_imports(include=["gpdiff_jax"]):
    from tests.fuzzing.readers import judged, readers

_SEEDS = 50  # files to begin with
_LONGEST = 1 << 17  # bytes of a file


def main(name: str, folder: pathlib.Path, seconds: int, inputs: int, seed: int) -> None:
    """Feeds one reader; does not return."""
    reader = readers(folder)[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    luck = random.Random(seed)
    with warnings.catch_warnings(action="ignore"):
        for number in range(_SEEDS):
            (corpus / str(number)).write_bytes(reader.make(luck))

    def feed_one(content: bytes) -> None:
        _, fault = judged(reader, folder, content)
        if fault is not None:
            (folder / "wrong.txt").write_text(fault)
            raise RuntimeError(fault)

    def change(content: bytes, longest: int, draw: int) -> bytes:
        turn = random.Random(draw)
        if turn.random() < 0.3:
            return atheris.Mutate(content, longest)
        with warnings.catch_warnings(action="ignore"):
            return reader.change(content, turn)[:longest]

    words = {
        "max_total_time": seconds,
        "runs": inputs,
        "seed": seed + 1,  # 0 stands for the clock
        "max_len": _LONGEST,
        "timeout": 120,  # HDF5 is given a minute
        "rss_limit_mb": 8192,
        "print_final_stats": 1,
        "artifact_prefix": f"{folder}/",
    }
    arguments = [sys.argv[0], *(f"-{word}={value}" for word, value in words.items()), str(corpus)]
    atheris.Setup(arguments, feed_one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:6]))
