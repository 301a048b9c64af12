"""What `maxlm` says and does where a run's newest checkpoints are damaged."""

import pytest

from maxlm.cli import main
from tests.training.runs import prepared, rows_of, train, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


def flip(step):
    """A bit in each file of arrays, so that parameters are hit wherever TensorStore has put them."""
    for file in step.glob("state/**/d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 64
        file.write_bytes(data)


def test_a_damaged_newest_checkpoint(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run) == 0
    main(["checkpoint", "digest", str(run)])
    digest = capsys.readouterr().out.split()[-1]
    rows = rows_of(run)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["4", "ok"], ["6", "ok"]]

    flip(run / "checkpoints/6")
    assert main(["checkpoint", "verify", str(run)]) == 3
    out, error = capsys.readouterr()
    assert "6  damaged: state/" in out and "1 of 2 checkpoints are damaged: 6" in error
    for words in (["eval"], ["generate", "--prompt", "the"]):
        assert main([words[0], "--run-dir", str(run), *words[1:]]) == 3
    assert main(["checkpoint", "digest", str(run)]) == 3
    assert main(["eval", "--run-dir", str(run), "--step", "4"]) == 0
    capsys.readouterr()
    arguments = ["train", str(config), "--run-dir", str(run), "--set", "logging.tensorboard=false"]
    assert main([*arguments, "--strict"]) == 3
    assert "--strict refuses" in capsys.readouterr().err
    assert (run / "checkpoints/6").is_dir()

    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert "checkpoint 6 is damaged (state/" in error and "resumed from step 4" in error
    assert (run / "checkpoints/6.damaged").is_dir()
    assert main(["checkpoint", "digest", str(run)]) == 0
    assert capsys.readouterr().out.split()[-1] == digest  # bit for bit as if nothing had been damaged
    assert [r["step"] for r in rows_of(run)] == [r["step"] for r in rows]

    for step in ("4", "6"):
        flip(run / "checkpoints" / step)
    for _ in range(2):  # a second start must not train from the beginning either
        assert main(arguments) == 3
        error = capsys.readouterr().err
        assert "no good checkpoint is left in" in error and "Traceback" not in error
