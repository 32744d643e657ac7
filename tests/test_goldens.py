"""Our methods give the losses and gradients of the official implementations, and the check of it can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kd_hf.methods import method_names
from tests.goldens.__main__ import main
from tests.goldens.check import check_file
from tests.goldens.options import OPTIONS, Option

FOLDER = Path(__file__).parent / "goldens"
FILES = sorted(file for file in FOLDER.glob("*/*.safetensors") if file.parent.name != "trajectories")


def rewrite(source: Path, folder: Path, changes=(), hparams=(), method=None, tensors=(), metadata=()) -> Path:
    """Copy a recorded file with tensors changed, hyper-parameters or the method's name replaced, or things added."""
    with safe_open(source, "pt") as stored:
        metadata = {**stored.metadata(), **dict(metadata)}
        tensors = {**{key: stored.get_tensor(key) for key in sorted(stored.keys())}, **dict(tensors)}
    for key, function in dict(changes).items():
        tensors[key] = function(tensors[key])
    metadata["hparams"] = json.dumps({**json.loads(metadata["hparams"]), **dict(hparams)})
    metadata["method"] = method or metadata["method"]
    file = folder / metadata["method"] / source.name
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata)
    return file


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_equal_to_the_official_code(file):
    row = check_file(file)
    assert row.status == "ok", row
    assert row.error <= 1e-9


# whole networks with their taps
NETWORKS = sorted(FOLDER.glob("*/e2e_*.safetensors"))
# what is quick to compile of every method that is trained under torch.compile
COMPILED = (
    "at/three_stages_w1000",
    "cls_kd/projector_no_manifold",
    "crd/first_step",
    "ctkd/dkd_half",
    "deform_attn/ref4",
    "deit_hard/token_alpha05",
    "deit_soft/numel_token_tau1",
    "dist/cifar_tau4_w2",
    "dkd/imagenet_t1_a1_b05",
    "fitnet/student_twice_w100",
    "kd/imagenet_t1_a05",
    "manifold/merge",
    "mgd/align_s12_t20",
    "mlkd/odd_batch_t1",
    "nkd/t3_g35_soft",
    "ofa/cnn_stages34_eps15",
    "ofd/authors_w1e-3",
    "pkt/signed",
    "reviewkd/authors_cifar",
    "rkd/w25_w50",
    "scalekd/tpp_swin_t12",
    "sdd/kd_m124_features",
    "sp/maps_w3000",
    "srrl/imagenet_s12_t20_a1_b1",
    "ttm/l05",
    "uskd/soft_with_pure_row",
    "vid/two_stages",
    "vidt_kd/original_tokens",
    "vitkd/e2e_deit3_to_deit_hard",
    "vkd/wide_student",
    "wsld/imagenet_t2_a25",
    "wttm/l1",
)


def assert_equal_with(option: Option, file: Path) -> None:
    row = check_file(file, option)
    assert row.status == "ok", row


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_equal_with_channels_last(file):
    assert_equal_with(OPTIONS["channels_last"], file)


@pytest.mark.parametrize("file", NETWORKS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_equal_when_activations_are_recomputed(file):
    assert_equal_with(OPTIONS["checkpointing"], file)


@pytest.mark.parametrize("name", COMPILED)
def test_equal_when_compiled(name):
    from torch._dynamo.utils import counters

    counters.clear()
    assert_equal_with(Option(backend="aot_eager"), FOLDER / f"{name}.safetensors")
    assert counters["stats"]["unique_graphs"] >= 1


def test_every_method_is_compiled():
    assert set(method_names()) - {"task"} <= {name.partition("/")[0] for name in COMPILED}


class Spoilt(Option):
    """Changes what it is to leave alone."""

    def tensor(self, value):
        # unevenly, because some losses normalise
        return value * torch.linspace(1, 1 + 1e-5, value.shape[-1], dtype=value.dtype) if self.channels_last else value

    def student(self, network):
        self._spoil(network, self.checkpointing)

    def trained(self, module):
        self._spoil(module, self.backend)

    @staticmethod
    def _spoil(module, wanted):
        with torch.no_grad():
            for parameter in module.parameters() if wanted else ():
                parameter *= 1 + 1e-6


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (Spoilt(channels_last=True), "mgd/align_s12_t20"),
        (Spoilt(channels_last=True), "scalekd/full_swin_cnn_ls_kd"),
        (Spoilt(channels_last=True), "scalekd/cap_extquery_v2"),
        (Spoilt(channels_last=True), "vidt_kd/orthogonal_square"),
        (Spoilt(channels_last=True), "vidt/swin_nano_forward"),
        *((Spoilt(checkpointing=True), f"{file.parent.name}/{file.stem}") for file in NETWORKS),
        *((Spoilt(backend="any"), name) for name in ("scalekd/tpp_swin_t12", "vkd/wide_student", "uskd/e2e_deit_hard")),
    ],
)
def test_an_option_reaches_what_it_is_for(option, name):
    assert check_file(FOLDER / f"{name}.safetensors", option).status.startswith("FAILED")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("kd/cifar_t3_a05", "out/loss"),
        ("kd/cifar_t3_a05", "out/ori_scale"),
        ("dkd/cifar_t4_a1_b8", "out/nckd_unweighted"),
        ("wsld/imagenet_t2_a25", "grad/in/logit_s"),
        ("uskd/imagenet_hard", "out/loss_rev_87a7197"),
        ("uskd/e2e_deit_hard", "grad/student/blocks.0.attn.qkv.weight"),
        ("uskd/e2e_deit_hard", "grad/param/loss_uskd.fc.bias"),
        ("uskd/e2e_deit_hard", "out/logit_s"),
        ("mgd/align_s12_t20", "grad/param/align.weight"),
        ("deit_soft/numel_token_tau1", "grad/in/student_logits_kd"),
        ("vkd/wide_teacher", "grad/param/projector.weight_effective"),
        ("vkd/wide_student", "out/teacher_normalised"),
        ("scalekd/cap_extquery_v2", "out/after/proj_student.1.running_var"),
        ("scalekd/tpp_swin_t12", "out/tokens_freq"),
        ("scalekd/full_swin_cnn_ls_kd", "grad/in/student_s3"),
        ("srrl/cifar_same16_a1_b5", "out/loss_last_sample_wiring"),
        ("vitkd/official_s12_t20_n16", "grad/in/low_s"),
        ("vitkd/e2e_deit3_to_deit_hard", "grad/param/loss_vitkd.mask_token"),
        ("manifold/same_tokens_k_all", "out/loss_mf_rand"),
        ("manifold/e2e_cait", "grad/param/student/cls_token"),
        ("cls_kd/projector_manifold", "out/loss_atn"),
        ("cls_kd/e2e_vit", "grad/param/projector/fc2.bias"),
        ("cls_kd/e2e_vit", "out/teacher_logits"),
        ("fitnet/student_twice_w100", "out/after/bn.running_var"),
        ("fitnet/student_twice_w100", "grad/param/bn.weight"),
        ("at/three_stages_w1000", "grad/in/feats_s.2"),
        ("at/rep_parts_w1000", "out/stage.2"),
        ("sp/maps", "grad/in/student"),
        ("rkd/squared", "out/angle"),
        ("pkt/signed", "out/loss_unweighted"),
        ("vid/two_stages", "out/init_log_scale"),
        ("vid/student_larger", "grad/param/0.log_scale"),
        ("crd/two_steps", "out/memory_v2.1"),
        ("crd/two_steps", "out/loss.1"),
        ("crd/first_step", "out/z_v1"),
        ("crd/first_step", "grad/param/embed_t.linear.weight"),
        ("dist/imagenet_tau1_w2", "out/intra"),
        ("logit_std/kd_t2_w9", "out/normalized_s"),
        ("logit_std/dkd_t2_w9", "out/loss_ce"),
        ("ttm/l01_b45", "out/wttm_unweighted"),
        ("ctkd/kd_start", "grad/param/global_T"),
        ("ctkd/dkd_half", "out/temperature"),
        ("mlkd/cifar_t4", "grad/in/logit_s_strong"),
        ("mlkd/odd_batch_t1", "out/loss_ce"),
        ("ofd/three_stages_w1e-3", "out/margin.2"),
        ("ofd/authors_w1e-3", "out/after/connectors.1.1.running_var"),
        ("reviewkd/authors_cifar", "out/result.1"),
        ("reviewkd/imagenet_preact_w8", "out/loss_epoch.1"),
        ("sdd/kd_m124_features", "grad/in/student_fc_bias"),
        ("sdd/kd_m124_features", "out/patch_t"),
        ("ofa/vit_cls_grid7", "grad/param/projector.3.1.0.attn.qkv.weight"),
        ("ofa/cnn_all_stages_eps_list", "out/loss_ofa"),
    ],
)
def test_a_perturbed_value_fails_and_is_named(tmp_path, name, key):
    file = rewrite(FOLDER / f"{name}.safetensors", tmp_path, {key: lambda value: value * (1 + 1e-6)})
    row = check_file(file)
    assert row.status == f"FAILED {key}"
    assert row.error == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        ("kd/cifar_t3_a05", {"temp": 3.001}),
        ("nkd/t3_g35_soft", {"gamma": 3.501}),
        ("mgd/same_c16", {"lambda_mgd": 0.9}),
        ("deit_soft/numel_token_tau1", {"reduction": "batchmean"}),
        ("deit_hard/notoken_alpha03", {"smoothing": 0.0}),
        ("vkd/wide_teacher", {"gamma": 1.001}),
        ("vkd/wide_student", {"orthogonal_map": "matrix_exp"}),
        ("scalekd/cap_selfquery_nonsquare", {"softmax_scale": 5.001}),
        ("scalekd/cap_extquery_v2", {"bn_training": False}),
        ("scalekd/dfm_7x7_c11", {"alpha": [0.08, 0.061]}),
        ("scalekd/full_swin_cnn_ls_kd", {"ce": {"type": "ce"}}),
        ("vitkd/same18_n9_l03", {"lambda_vitkd": 0.31}),
        ("manifold/merge", {"max_patch_num": 0}),
        ("manifold/extra_token", {"K": 23}),
        ("cls_kd/relation_manifold", {"last_w": 2.4}),
        ("cls_kd/projector_no_manifold", {"t_id": [1, 6, 3]}),
        ("fitnet/student_twice_w100", {"feat_weight": 100.001}),
        ("at/three_stages_w1000", {"p": 3}),
        ("rkd/squared", {"squared": False}),
        ("rkd/w25_w50", {"eps": 1e-8}),
        ("rkd/l2_s8_t14", {"with_l2_norm": False}),
        ("vid/two_stages", {"init_pred_var": 4.99}),
        ("crd/later_step_rep", {"nce_m": 0.91}),
        ("crd/later_step_rep", {"z_v2": 27.251}),
        ("crd/two_steps", {"nce_t": 0.071}),
        ("dist/cifar_tau4_w2", {"gamma": 1.001}),
        ("logit_std/kd_t2_w9", {"logit_stand": False}),
        ("logit_std/dkd_t2_w9", {"epoch": 19}),
        ("wttm/l02_b4", {"ttm_l": 0.201}),
        ("ctkd/kd_start", {"lambda": -0.999}),
        ("ctkd/dkd_half", {"dkd_beta": 2.001}),
        ("mlkd/cifar_t4", {"logit_stand": True}),
        ("ofd/authors_w1e-3", {"feat_weight": 0.00101}),
        ("reviewkd/authors_cifar", {"warmup_epochs": 21}),
        ("sdd/dkd_m12", {"epoch": 19}),
        ("sdd/nkd_m12", {"gamma": 1.501}),
        ("sdd/kd_m124_features", {"M": "[1,2]"}),
        ("ofa/cnn_all_stages_eps_list", {"ofa_eps": [1.0, 1.1, 1.3, 2.0, 1.501]}),
    ],
)
def test_every_hyper_parameter_counts(tmp_path, name, hparams):
    assert check_file(rewrite(FOLDER / f"{name}.safetensors", tmp_path, hparams=hparams)).status.startswith("FAILED")


# one file of every way in which files are opened
KINDS = (
    "cls_kd/e2e_vit",
    "cls_kd/projector_manifold",
    "crd/two_steps",
    "ctkd/kd_start",
    "deform_attn/ref2",
    "deit_hard/token_alpha05",
    "fitnet/same_size_w100",
    "kd/cifar_t3_a05",
    "logit_std/dkd_t2_w9",
    "manifold/merge",
    "mlkd/cifar_t4",
    "ofa/vit_cls_grid7",
    "ofd/authors_w1e-3",
    "reviewkd/authors_cifar",
    "scalekd/cap_selfquery_nonsquare",
    "scalekd/dfm_4x4_c6",
    "scalekd/fd_same_c10",
    "scalekd/full_swin_cnn_ls_kd",
    "scalekd/kd_t1_a05",
    "scalekd/tpp_beit_t16",
    "sdd/dkd_m12",
    "sdd/kd_m124_features",
    "sp/maps",
    "srrl/cifar_same16_a1_b5",
    "uskd/e2e_deit_hard",
    "vid/two_stages",
    "vidt/swin_nano_forward",
    "vidt_criterion/three_stages",
    "vidt_kd/orthogonal_square",
    "vitkd/official_s12_t20_n16",
    "vkd/wide_student",
)
NUMBER = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_with_more_than_is_read_is_refused(tmp_path, name):
    source = FOLDER / f"{name}.safetensors"
    for key in ("in/more", "out/more", "draw/more", "grad/in/more", "grad/param/more", "param/more", "more"):
        status = check_file(rewrite(source, tmp_path, tensors={key: NUMBER})).status
        assert status.startswith("FAILED Mismatch: ")
        assert key.rpartition("/")[2] in status, (key, status)
    assert "hparams more" in check_file(rewrite(source, tmp_path, hparams={"more": 1})).status
    assert "metadata more" in check_file(rewrite(source, tmp_path, metadata={"more": "1"})).status


@pytest.mark.parametrize(
    ("name", "block", "more"),
    [
        ("scalekd/full_swin_cnn_ls_kd", "s3", "hparams s3.more"),
        ("uskd/e2e_deit_hard", "losses", "unknown losses more"),
        ("cls_kd/e2e_vit", "student", "more"),
    ],
)
def test_an_option_of_a_block_that_is_not_read_is_refused(tmp_path, name, block, more):
    source = FOLDER / f"{name}.safetensors"
    with safe_open(source, "pt") as stored:
        hparams = json.loads(stored.metadata()["hparams"])
    file = rewrite(source, tmp_path, hparams={block: {**hparams[block], "more": 1}})
    assert check_file(file).status.startswith("FAILED")
    assert more in check_file(file).status


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        ("vkd/wide_student", {"kl_T": 2.0}),
        ("vkd/wide_student", {"criterion": "hinge"}),
        ("vkd/wide_student", {"student_dim": 47}),
        ("wsld/cifar_t4_a225", {"num_classes": 20}),
        ("uskd/imagenet_hard", {"channel": 10}),
        ("deit_soft/numel_token_tau1", {"dist_token": False}),
        ("deit_soft/numel_token_tau1", {"base_criterion": "hinge"}),
        ("manifold/e2e_vit", {"dist_token": True}),
        ("cls_kd/e2e_vit", {"img_size": [12, 16]}),
        ("scalekd/cap_selfquery_nonsquare", {"pos_hw": [6, 4]}),
        ("scalekd/kd_t1_a05", {"batch": 7}),
        ("deform_attn/ref2", {"reference_dim": 4}),
        ("vidt_kd/original_tokens", {"student_dim": 16}),
        ("ofd/authors_w1e-3", {"kernel_size": 3}),
        ("reviewkd/authors_cifar", {"out_shapes": [1, 2, 8]}),
        ("reviewkd/imagenet_preact_w8", {"in_channels": [4, 6, 8]}),
        ("ofa/cnn_stages34_eps15", {"stage_shape": {"3": [6, 4, 4], "4": [8, 2, 1]}}),
    ],
)
def test_hyper_parameters_that_contradict_the_tensors_are_refused(tmp_path, name, hparams):
    assert "FAILED Mismatch" in check_file(rewrite(FOLDER / f"{name}.safetensors", tmp_path, hparams=hparams)).status


def test_what_cannot_be_run_fails_with_the_reason(tmp_path):
    stray = rewrite(FOLDER / "uskd" / "imagenet_hard.safetensors", tmp_path / "b", {"param/fc.bias": lambda v: v[:-1]})
    assert "weak.bias" in check_file(stray).status
    broken = tmp_path / "kd" / "broken.safetensors"
    broken.parent.mkdir()
    broken.write_bytes(b"no tensors")
    assert check_file(broken).status.startswith("FAILED SafetensorError")


def test_exit_codes_and_table(tmp_path, capsys):
    chosen = ("kd/cifar_t3_a05", "vitkd/same18_n9_l03", "trajectories/vitkd_nkd_adamw")
    for name in chosen:
        (tmp_path / "some" / name).parent.mkdir(parents=True)
        (tmp_path / "some" / f"{name}.safetensors").symlink_to(FOLDER / f"{name}.safetensors")
    assert main([str(tmp_path / "some")]) == 0
    *rows, summary = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["kd", "trajectories", "vitkd"]
    assert len({row.index("  ok") for row in rows}) == 1, "the columns are not aligned"
    assert rows[1].endswith("ok (rates are the file's, not the recipe's)")
    assert summary.startswith("3 ok")
    assert main([str(tmp_path / "some"), "--option", "channels_last"]) == 0
    assert "trajectories" not in capsys.readouterr().out

    rewrite(FILES[0], tmp_path)
    rewrite(FILES[0], tmp_path, method="of_next_year")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "method not there" in out
    assert f"1 not covered (of_next_year/{FILES[0].stem})" in out

    (tmp_path / "of_next_year" / FILES[0].name).unlink()
    assert main([str(tmp_path), "--option", "channels_last"]) == 0
    assert main([str(tmp_path)]) == 0
    rewrite(FILES[0], tmp_path, {"out/loss": torch.neg})
    assert main([str(tmp_path)]) == 1
    assert "FAILED out/loss" in capsys.readouterr().out


def test_nothing_to_check_is_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert main([str(folder)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
