"""What the losses cost, against their straightforward forms.

``python -m tests.programs.loss_times [--rounds 41] [NAME …]``.

Forward and backward of both forms in turn, one thread, B = 32 and K = 1000 (ScaleKD B = 8). Times are processor time
of this process, so that the turns of other programs do not count; the ratio is the median over rounds, in brackets its
quartiles. The values of both forms are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import torch
from torch import Tensor, nn

from kd_hf.data.noise import NoiseSource
from kd_hf.info import Shapes
from kd_hf.methods.at import AT
from kd_hf.methods.base import Method
from kd_hf.methods.cls_kd import ClsKD
from kd_hf.methods.crd import CRD
from kd_hf.methods.cross_attention import CrossAttentionProjector
from kd_hf.methods.ctkd import CTKD
from kd_hf.methods.deit_soft import DeiTSoft
from kd_hf.methods.dist import DIST
from kd_hf.methods.dkd import DKD
from kd_hf.methods.kd import KD
from kd_hf.methods.manifold import Manifold
from kd_hf.methods.mgd import MGD
from kd_hf.methods.mlkd import MLKD
from kd_hf.methods.nkd import NKD
from kd_hf.methods.ofd import OFD
from kd_hf.methods.orthogonal import OrthogonalProjection
from kd_hf.methods.pkt import PKT
from kd_hf.methods.reviewkd import ReviewKD
from kd_hf.methods.rkd import RKD
from kd_hf.methods.scalekd import ScaleKD
from kd_hf.methods.sdd import SDD
from kd_hf.methods.sp import SP
from kd_hf.methods.ttm import TTM
from kd_hf.methods.uskd import USKD
from kd_hf.methods.vid import VID
from kd_hf.methods.vitkd import ViTKD
from kd_hf.methods.wsld import WSLD
from kd_hf.methods.wttm import WTTM
from kd_hf.outputs import Outputs, Target
from tests.methods import straightforward

BATCH, CLASSES = 32, 1000
TURN = 0.01  # seconds of a turn at least


@dataclass
class Case:
    """Two forms of a loss on the same tensors, and the tensors that get a gradient."""

    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    leaves: Iterable[Tensor]
    bound: float | None = None
    rounds: int | None = None

    def seconds(self, form: Callable[[], Tensor], repeats: int) -> float:
        """Processor time of one forward and backward pass."""
        start = time.process_time()
        for _ in range(repeats):
            for leaf in self.leaves:
                leaf.grad = None
            form().backward()
        return (time.process_time() - start) / repeats


def build(method: type[Method], student: dict | None = None, teacher: dict | None = None, **config) -> Method:
    return method(method.Config(**config), Shapes(CLASSES, student or {}), Shapes(CLASSES, teacher or {}), {})


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def total(method: Method, *given: object) -> Callable[[], Tensor]:
    """The sum of a method's losses for its arguments; without draws where none are given."""
    given = (*given, {}) if len(given) == 3 else given
    return lambda: reduce(operator.add, method(*given).values())


def logit_cases() -> dict[str, Case]:
    """Losses on logits and index labels."""
    student, teacher = leaf(BATCH, CLASSES), 2 * torch.randn(BATCH, CLASSES)
    label = torch.randint(CLASSES, (BATCH,))
    plain = straightforward
    forms: Mapping[str, tuple[type[Method], Callable[[], Tensor], float | None]] = {
        "kd": (KD, lambda: plain.kd(student, teacher), 0.70),
        "nkd": (NKD, lambda: plain.nkd(student, teacher, label), 0.33),
        "dkd": (DKD, lambda: plain.dkd(student, teacher, label), 0.75),
        "wsld": (WSLD, lambda: plain.wsld(student, teacher, label), None),
        "deit_soft": (DeiTSoft, lambda: plain.deit_soft(student, teacher), None),
    }
    cases = {
        name: Case(total(build(method), Outputs(student), Outputs(teacher), Target(label)), form, [student], bound)
        for name, (method, form, bound) in forms.items()
    }
    feature, uskd = leaf(BATCH, 256), build(USKD, {"pooled": (256,)})
    cases["uskd"] = Case(
        total(uskd, Outputs(student, taps={"pooled": feature}), None, Target(label)),
        lambda: plain.uskd(student, uskd.weak(feature), label),
        [student, feature, *uskd.parameters()],
        0.65,
    )
    return cases


def tapped(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> tuple[Outputs, Outputs, Target]:
    batch = len(next(iter(student.values())))
    return (
        Outputs(torch.empty(batch, 0), taps=student),
        Outputs(torch.empty(batch, 0), taps=teacher),
        Target(torch.zeros(batch, dtype=torch.long)),
    )


def token_cases() -> dict[str, Case]:
    """Losses on the tokens of two plain transformers, DeiT-T and one of width 384 or 768."""
    ours, theirs = leaf(BATCH, 197, 192), torch.randn(BATCH, 197, 768)
    one = {"student_blocks": [0], "teacher_blocks": [0]}
    shapes = {"student": {"block:0": (197, 192)}, "teacher": {"block:0": (197, 768)}}
    outputs = tapped({"block:0": ours}, {"block:0": theirs})
    chosen = torch.randperm(BATCH * 197)[:192]
    manifold, cls_kd = build(Manifold, **shapes, **one), build(ClsKD, **shapes, **one, manifold=False)

    role = {"block:0": (197, 192), "block:1": (197, 192), "high": (196, 192)}
    vitkd = build(ViTKD, role, {name: (shape[0], 384) for name, shape in role.items()})
    low, low_t = [leaf(BATCH, 197, 192) for _ in range(2)], [torch.randn(BATCH, 197, 384) for _ in range(2)]
    high, high_t, noise = leaf(BATCH, 196, 192), torch.randn(BATCH, 196, 384), torch.rand(BATCH, 196)
    both = [dict(zip(role, (*blocks, end), strict=True)) for blocks, end in ((low, high), (low_t, high_t))]

    def plain_vitkd() -> Tensor:
        patches = [[block[:, 1:] for block in blocks] for blocks in (low, low_t)]
        learned = vitkd.align_low, vitkd.align_high, vitkd.mask_token, vitkd.generation
        return straightforward.vitkd(*patches, high, high_t, *learned, noise)

    return {
        "manifold": Case(
            total(manifold, *outputs, {"perm.0": chosen}),
            lambda: straightforward.manifold([ours], [theirs], [chosen]),
            [ours],
            0.85,
        ),
        "cls_kd": Case(
            total(cls_kd, *outputs),
            lambda: straightforward.cls_kd([ours], [theirs], cls_kd.projector),
            [ours, *cls_kd.parameters()],
        ),
        "vitkd": Case(
            total(vitkd, *tapped(*both), {"noise": noise}), plain_vitkd, [*low, high, *vitkd.parameters()], rounds=9
        ),
    }


def map_cases() -> dict[str, Case]:
    """Losses on maps: MGD, and the mimicking losses and projectors of ScaleKD."""
    ours, theirs, noise = leaf(BATCH, 512, 7, 7), torch.randn(BATCH, 512, 7, 7), torch.rand(BATCH, 512, 1, 1)
    mgd = build(MGD, {"feature": (512, 7, 7)}, {"feature": (512, 7, 7)})
    last, goal = leaf(8, 49, 768), torch.randn(8, 49, 768)
    shapes = {"student": {"s4": (49, 768)}, "teacher": {"target": (49, 768)}}
    # between equal widths the pointwise projector is nothing: what is left are the two views of a stage
    dfm = build(ScaleKD, **shapes, projector="pointwise")

    def plain_dfm() -> Tensor:
        views = [straightforward.mimicking(last, goal, (7, 7), alternative) for alternative in (False, True)]
        return 0.08 * views[0] + 0.06 * views[1]

    feature = leaf(8, 1024, 14, 14)
    cap = CrossAttentionProjector((1024, 14, 14), 384, (14, 14), 6, 5.0, "batch", own_queries=True)
    plain_cap = straightforward.CrossAttentionProjector(cap)
    return {
        "mgd": Case(
            total(mgd, *tapped({"feature": ours}, {"feature": theirs}), {"mask": noise}),
            lambda: straightforward.mgd(ours, theirs, mgd.align, mgd.generation, noise),
            [ours, *mgd.parameters()],
            rounds=9,
        ),
        "scalekd_dfm": Case(total(dfm, *tapped({"s4": last}, {"target": goal})), plain_dfm, [last], 0.15),
        "scalekd_cap": Case(
            lambda: cap(feature).square().sum(),
            lambda: plain_cap(feature).square().sum(),
            [feature, *{*cap.parameters(), *plain_cap.parameters()}],
            rounds=9,
        ),
    }


def projector_cases() -> dict[str, Case]:
    """VkD's projector 192 → 3024 and PyTorch's parametrisation, from equal weights."""
    plain = straightforward.orthogonal_linear(192, 3024)
    ours = OrthogonalProjection(192, 3024)
    ours.set_base(plain.parametrizations.weight[0].base[:, :192].clone())
    difference = (ours.weight() - plain.weight).abs().max().item()
    assert difference <= 1e-6, f"the weights of the projectors differ by {difference:g}"
    feature, goal = leaf(BATCH, 192), torch.randn(BATCH, 3024)
    leaves = [feature, *ours.parameters(), *plain.parameters()]
    forms = [lambda module=module: (module(feature) - goal).square().mean() for module in (ours, plain)]
    return {"vkd_projector": Case(*forms, leaves, 0.01, rounds=3)}


def relation_cases() -> dict[str, Case]:
    """Losses that compare the images of a batch, and CRD with CIFAR-100's 50,000 rows and a tenth of its negatives."""
    count, (ours, theirs) = 64, (leaf(64, 256), torch.randn(64, 512))
    plain = straightforward
    shapes = {"feature": (256,)}, {"feature": (512,)}
    outputs = tapped({"feature": ours}, {"feature": theirs})
    cases = {
        "rkd": Case(total(build(RKD, *shapes), *outputs), lambda: plain.rkd(ours, theirs), [ours]),
        "pkt": Case(total(build(PKT, *shapes), *outputs), lambda: plain.pkt(ours, theirs), [ours]),
        "sp": Case(total(build(SP, *shapes), *outputs), lambda: plain.sp(ours, theirs), [ours]),
    }
    logits, reference = leaf(BATCH, CLASSES), 2 * torch.randn(BATCH, CLASSES)
    method = build(DIST)
    given = Outputs(logits), Outputs(reference), Target(torch.zeros(BATCH, dtype=torch.long))
    cases["dist"] = Case(total(method, *given), lambda: plain.dist(logits, reference), [logits])

    images = NoiseSource(50_000, 8, 100)
    sides = Shapes(100, shapes[0], samples=images), Shapes(100, shapes[1])
    crd = CRD(CRD.Config(negatives=1638), *sides, {}).eval()  # the banks stay as they are
    rows = torch.randperm(len(images))[:count]
    chosen = torch.cat([rows[:, None], torch.randint(len(images), (count, 1638))], 1)
    embeddings, banks = (crd.embed_s.linear, crd.embed_t.linear), (crd.memory_s, crd.memory_t)
    target = Target(torch.zeros(count, dtype=torch.long), None, rows)
    cases["crd"] = Case(
        total(crd, *outputs[:2], target, {"contrast_index": chosen}),
        lambda: plain.crd(ours, theirs, embeddings, banks, chosen),
        [ours, *crd.parameters()],
        rounds=9,
    )
    return cases


def stage_cases() -> dict[str, Case]:
    """Losses on the maps of three stages: resnet32x4 and resnet8x4 on CIFAR-100's images."""
    sizes = [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    ours, theirs = [leaf(BATCH, *size) for size in sizes], [torch.randn(BATCH, *size) for size in sizes]
    shapes = {f"map{place}": size for place, size in enumerate(sizes)}
    outputs = tapped(dict(zip(shapes, ours, strict=True)), dict(zip(shapes, theirs, strict=True)))
    at, vid = build(AT, shapes, shapes), build(VID, shapes, shapes)
    return {
        "at": Case(total(at, *outputs), lambda: straightforward.at(ours, theirs), ours),
        "vid": Case(
            total(vid, *outputs),
            lambda: straightforward.vid(ours, theirs, vid.stages),
            [*ours, *vid.parameters()],
            rounds=9,
        ),
    }


def matching_cases() -> dict[str, Case]:
    """Losses on logits of tables: powers of the teacher's distribution, a learned temperature, two views."""
    plain, (student, strong) = straightforward, (leaf(BATCH, CLASSES), leaf(BATCH, CLASSES))
    teacher, strong_teacher = (2 * torch.randn(BATCH, CLASSES) for _ in range(2))
    target = Target(torch.randint(CLASSES, (BATCH,)))
    given = Outputs(student, strong=Outputs(strong)), Outputs(teacher, strong=Outputs(strong_teacher)), target
    ctkd, reversal = build(CTKD), torch.tensor(-1.0)
    return {
        "ttm": Case(total(build(TTM), *given), lambda: plain.ttm(student, teacher, 0.1), [student]),
        "wttm": Case(total(build(WTTM), *given), lambda: plain.ttm(student, teacher, 0.2, True), [student]),
        "ctkd": Case(
            total(ctkd, *given, {"reversal": reversal}),
            lambda: plain.deit_soft(student, teacher, ctkd.temperature(reversal)),
            [student, ctkd.level],
        ),
        "mlkd": Case(
            total(build(MLKD), *given), lambda: plain.mlkd(student, teacher, strong, strong_teacher), [student, strong]
        ),
    }


def reviewed_cases() -> dict[str, Case]:
    """Losses on the maps of resnet32x4 and resnet8x4 before their ReLUs, on regions of the last, and on its heads."""
    plain, sizes = straightforward, [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    ours, theirs = [leaf(BATCH, *size) for size in sizes], [torch.randn(BATCH, *size) for size in sizes]
    stages = {f"stage_{place}": size for place, size in enumerate(sizes, 1)}
    norms = {role: nn.BatchNorm2d(size[0]) for role, size in stages.items()}
    ofd = OFD(OFD.Config(), *(Shapes(CLASSES, stages) for _ in range(2)), norms)
    margins = [ofd.get_buffer(f"margin_{role}") for role in stages]
    levels = {"pooled": (256,)} | {f"level{place}": size for place, size in enumerate(reversed(sizes), 1)}
    reviewkd = build(ReviewKD, levels, levels)
    pooled, pooled_t = leaf(BATCH, 256), torch.randn(BATCH, 256)
    reviewed = [[vector, *reversed(maps)] for vector, maps in ((pooled, ours), (pooled_t, theirs))]

    heads, label = [nn.Linear(256, 100) for _ in range(2)], torch.randint(100, (BATCH,))
    parts = dict(zip(("student:head", "head"), heads, strict=True))
    sdd = SDD(SDD.Config(), *(Shapes(100, {"feature": sizes[-1]}) for _ in range(2)), parts)
    last = tapped({"feature": ours[-1]}, {"feature": theirs[-1]})[:2]

    def plain_sdd() -> Tensor:
        with torch.no_grad():
            reference = plain.regions(theirs[-1], heads[1])
        return plain.sdd(plain.regions(ours[-1], heads[0]), reference, label)

    return {
        "ofd": Case(
            total(ofd, *tapped(*(dict(zip(stages, maps, strict=True)) for maps in (ours, theirs)))),
            lambda: plain.ofd(ours, theirs, ofd.connectors, margins),
            [*ours, *ofd.parameters()],
            rounds=9,
        ),
        "reviewkd": Case(
            total(reviewkd, *tapped(*(dict(zip(levels, maps, strict=True)) for maps in reviewed))),
            lambda: plain.reviewkd(*reviewed, reviewkd.levels),
            [pooled, *ours, *reviewkd.parameters()],
            rounds=5,
        ),
        "sdd": Case(total(sdd, *last, Target(label)), plain_sdd, [ours[-1], *heads[0].parameters()]),
    }


GROUPS: Mapping[str, Callable[[], dict[str, Case]]] = {
    "kd nkd dkd wsld deit_soft uskd": logit_cases,
    "manifold cls_kd vitkd": token_cases,
    "mgd scalekd_dfm scalekd_cap": map_cases,
    "vkd_projector": projector_cases,
    "rkd pkt sp dist crd": relation_cases,
    "at vid": stage_cases,
    "ttm wttm ctkd mlkd": matching_cases,
    "ofd reviewkd sdd": reviewed_cases,
}


def measure(name: str, case: Case, rounds: int) -> str:
    """The line of a case. Raises AssertionError where its forms disagree."""
    values = [form().item() for form in (case.ours, case.plain)]
    assert abs(values[0] - values[1]) <= 2e-5 * abs(values[1]), f"{name}: {values[0]} and {values[1]}"
    repeats = [max(1, round(TURN / case.seconds(form, 1))) for form in (case.ours, case.plain)]
    times: list[tuple[float, float]] = []
    for turn in range(case.rounds or rounds):
        sides = [(case.ours, repeats[0]), (case.plain, repeats[1])]
        taken = [case.seconds(*side) for side in sides[:: -1 if turn % 2 else 1]][:: -1 if turn % 2 else 1]
        times.append((taken[0], taken[1]))
    ratios = sorted(ours / plain for ours, plain in times)
    low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
    ours, plain = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
    bound = "" if case.bound is None else f"{case.bound:.2f}"
    verdict = "" if case.bound is None else "reached" if middle <= case.bound else "MISSED"
    spread = f"[{low:.4f}–{high:.4f}]"
    return f"{name:14} {ours:10.3f} {plain:10.3f} {middle:9.4f}  {spread:18} {bound:>6}  {verdict}"


def main() -> None:
    """Print the table."""
    names = " ".join(GROUPS).split()
    parser = argparse.ArgumentParser(prog="python -m tests.programs.loss_times", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    for name in set(args.names) - set(names):
        parser.error(f"unknown loss '{name}'; known: {', '.join(names)}")
    torch.set_num_threads(1)
    print(f"{'loss':14} {'ours, ms':>10} {'plain, ms':>10} {'ratio':>9}  {'quartiles':18} {'bound':>6}")
    for group, build_cases in GROUPS.items():
        wanted = [name for name in group.split() if not args.names or name in args.names]
        torch.manual_seed(0)
        cases = build_cases() if wanted else {}
        for name in wanted:
            print(measure(name, cases[name], args.rounds), flush=True)


if __name__ == "__main__":
    main()
