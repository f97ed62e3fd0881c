"""The command of an installed wheel, from a folder of the user's: nothing of the clone is beside it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what the wheel holds, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "w2sg", "conf", "docs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_conf_and_the_command(site):
    shipped = {str(file.relative_to(ROOT / "conf")) for file in (ROOT / "conf").rglob("*.yaml")}
    assert {str(file.relative_to(site / "w2sg/conf")) for file in (site / "w2sg/conf").rglob("*.yaml")} == shipped
    (metadata,) = site.glob("w2sg-*.dist-info")
    assert "w2sg = w2sg.cli.main:main" in (metadata / "entry_points.txt").read_text()
    assert not (site / "conf").exists()
    assert (site / "w2sg/docs/howto/loss.md").is_file()


@pytest.mark.slow
def test_the_command_works_from_another_folder(site, tmp_path, pairs_folder, tiny_gpt2):
    known = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def w2sg(*words: str):
        command = [sys.executable, "-m", "w2sg", *words]
        return subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)

    where = [sys.executable, "-c", "from w2sg.config.plugins import CONF; print(CONF)"]
    assert subprocess.check_output(where, cwd=tmp_path, env=known, text=True).strip() == str(site / "w2sg" / "conf")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(f"# A tiny one\nname: {tiny_gpt2}\nmax_length: 64\n")
    assert "gather finished runs" in w2sg("--help").stdout
    assert "mine                   A tiny one" in w2sg("train", "--help").stdout
    data = ["dataset=local", f"dataset.path={pairs_folder}", "weak=bow", "weak.epochs=1", "trainer=cpu"]
    run = w2sg("train", "strong=mine", *data, "strong.tune=head", "optim.head.epochs=1", "hydra.run.dir=outputs/run")
    assert "strong ceiling" in run.stdout, run.stderr
    assert "w2sg train strong=mine" in (tmp_path / "outputs/run/report.html").read_text()
    compared = w2sg("compare", "outputs")
    assert "bag-of-words" in compared.stdout, compared.stderr
    assert "finished" in w2sg("store", "list").stdout
    assert "\nw2sg train loss=mine.brier loss.scale=2.0\n" in w2sg("docs", "howto/loss").stdout
    missing = w2sg("compare", "nowhere").stderr
    assert missing.startswith("error: compare: there is no folder nowhere; name the one"), missing
    assert "as `w2sg compare outputs`" in missing
