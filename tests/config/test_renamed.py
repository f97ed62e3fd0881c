"""Options under their old names: read under the new ones, typed, in files and in sweeps, and said once."""

import hydra
import pytest

from w2sg.config import composing, renamed
from w2sg.config.check import check
from w2sg.config.hydra import register
from w2sg.config.model_schema import ModelConfig
from w2sg.config.options import DPO, SFT
from w2sg.config.plugins import CONF
from w2sg.config.typed import typed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weak.train=lora", "weak.tune=lora"),
        ("++strong.layer=8", "++strong.feature_layer=8"),
        ("strong.layers=6", "strong.keep_layers=6"),
        ("~strong.candidates", "~strong.feature_layer_candidates"),
        ("weak.untuned=gpt2", "weak.before_alignment=gpt2"),
        ("training=default", "optim=default"),
        ("training.full.lr=1", "optim.full.lr=1"),
        ("training.head.batch_size=8", "optim.head.global_batch_size=8"),
        ("method.sft.clip=null", "method.sft.max_grad_norm=null"),
        ("method.dpo.supervised_mean=token", "method.dpo.sft_mean=token"),
        ("method.sampling.batch_size=8", "method.sampling.batch_size=8"),
        ("refine.batch_size=2,5,9", "refine.context_size=2,5,9"),
        ("decoder.guide.layer=3", "decoder.guide.feature_layer=3"),
        ("dataset.sizes={ground_truth: 4, test: 2}", "dataset.sizes={weak_train: 4, test: 2}"),
        ("method.ceiling_split=ground_truth,transfer", "method.ceiling_split=weak_train,transfer"),
        ("method.links=[{layer: 8}, {layers: 2}]", "method.links=[{feature_layer: 8}, {keep_layers: 2}]"),
        ("seed=${trainer.eval_tokens}", "seed=${trainer.tokens_per_eval_batch}"),
        ("strong.tune=head", "strong.tune=head"),
    ],
)
def test_a_typed_name_is_the_one_of_today(old, new):
    assert renamed.override(old) == new
    assert renamed.override(new) == new


OLD = """
# @package _global_
defaults:
  - override /training: default
weak: {train: lora, micro_batch: 2}
training: {lora: {warmup: 0.25}}
hydra: {sweeper: {params: {strong.layers: "2,3"}}}
"""


def test_an_old_file_is_read_and_what_is_typed_overrules_it(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "old.yaml").write_text(OLD.lstrip())
    renamed.say.cache_clear()
    register(users=tmp_path)
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", ["weak=gpt2", "experiment=old", "weak.micro_batch_size=4"])
        composing.settle("train", typed(["weak=gpt2", "experiment=old", "weak.train=full", "strong.quantise=2"]), check)
    finally:
        register()
    assert (cfg.weak.tune, cfg.weak.micro_batch_size, cfg.optim.lora.warmup_fraction) == ("lora", 4, 0.25)
    assert "train" not in cfg.weak
    said = capsys.readouterr().err.splitlines()
    assert "note: weak.train is now weak.tune" in said
    assert "note: strong.quantise is now strong.round_weights" in said
    assert len(said) == len(set(said))


def test_a_key_that_there_never_was_is_not_said_to_be_renamed(capsys):
    renamed.say.cache_clear()
    assert renamed.override("training.head.btch_size=4") == "training.head.btch_size=4"
    assert capsys.readouterr().err == ""
    assert renamed.override("training.head.batch_size=4") == "optim.head.global_batch_size=4"
    assert "training.head.batch_size is now optim.head.global_batch_size" in capsys.readouterr().err


def test_keys_hold_the_old_names():
    assert {"batch_size", "warmup", "clip", "validation"} <= SFT().model_dump().keys()
    assert {"global_batch_size", "sft_weight"} <= DPO().model_dump(by_alias=True).keys()
    spec = ModelConfig(name="gpt2", tune="head")
    assert spec == ModelConfig.model_validate({"name": "gpt2", "train": "head"})  # as in old reports
    assert spec.model_dump()["train"] == "head"


def test_a_report_of_an_earlier_version_has_the_names_of_today(capsys):
    old = {"weak": {"untuned": None, "lr": 1}, "training": {"full": {"clip": None}}, "seed": 0}
    new = {"weak": {"before_alignment": None, "lr": 1}, "optim": {"full": {"max_grad_norm": None}}, "seed": 0}
    assert renamed.tree(old, quiet=True) == new
    assert capsys.readouterr().err == ""
