"""What a detector predicts, stage by stage, read from what it hands to its own loss.

Every detector of transformers calls its loss with all it has predicted, auxiliary predictions and denoising queries
too. Listening to that call needs nothing to be computed twice, and nothing to be known of the heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Prediction = dict[str, Any]
"""``logits`` ``[B, Q, K]`` and ``pred_boxes`` ``[B, Q, 4]`` of one stage, and what else its loss reads."""


@dataclass
class Predictions:
    """All predictions of one pass; boxes are relative to the frame that the network works in."""

    last: Prediction
    earlier: list[Prediction] = field(default_factory=list)
    """Of the stages before, in order."""
    encoder: Prediction | None = None
    """Of the encoder's tokens that became queries."""
    denoising: list[Prediction] = field(default_factory=list)
    """Of queries that are objects with noise, of every stage."""
    denoising_facts: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def listening(network: Any, heard: dict[str, Any]) -> Iterator[None]:
    """Within it, the network's loss is not computed: its arguments are put into `heard`, by name."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    losses: Mapping[str, Any] = LOSS_MAPPING
    signature = inspect.signature(losses[network.loss_type])

    def listen(*args: Any, **kwargs: Any) -> tuple[None, None, None]:
        bound = signature.bind(*args, **kwargs)
        heard.update(bound.arguments, **bound.arguments.get("kwargs", {}))
        return None, None, None

    before = vars(network).get("_loss_function")
    network.loss_function = listen
    try:
        yield
    finally:
        if before is None:
            del network._loss_function
        else:
            network.loss_function = before


def of_detr(heard: Mapping[str, Any]) -> Predictions:
    """DETR and its relatives: ``[S, B, Q, …]`` with the last stage; LW-DETR's encoder predicts too."""
    found = Predictions(_prediction(heard["logits"], heard["pred_boxes"]))
    if heard.get("outputs_class") is not None:
        pairs = zip(heard["outputs_class"][:-1], heard["outputs_coord"][:-1], strict=True)
        found.earlier = [_prediction(*pair) for pair in pairs]
    if heard.get("enc_outputs_class") is not None:
        found.encoder = _prediction(heard["enc_outputs_class"], heard["enc_outputs_coord"])
    return found


def of_rt_detr(heard: Mapping[str, Any]) -> Predictions:
    """RT-DETR: ``[B, S, Q, …]``, of which the first queries are objects with noise."""
    noisy, own = _split(heard, {"logits": "outputs_class", "pred_boxes": "outputs_coord"})
    *earlier, last = _stages(own)
    return _with_helpers(heard, last, earlier, _stages(noisy))


def of_d_fine(heard: Mapping[str, Any]) -> Predictions:
    """D-FINE: the same with a distribution for each edge of a box, which earlier stages learn from the last one's.

    What belongs together is paired as transformers does it: the first class and box with the first distributions.
    """
    inside = {name: heard[name].clamp(0, 1) for name in ("outputs_coord", "enc_topk_bboxes")}
    names = {"logits": "outputs_class", "pred_boxes": "outputs_coord"}
    names |= {"pred_corners": "predicted_corners", "ref_points": "initial_reference_points"}
    noisy, own = _split({**heard, **inside}, names)
    last = _prediction(own["logits"][:, -1], own["pred_boxes"][:, -1])
    earlier = _taught({name: part[:, :-1] for name, part in own.items()}, own)
    return _with_helpers({**heard, **inside}, last, earlier, _taught(noisy, noisy))


def of_vidt(output: Any) -> Predictions:
    """ViDT: its output holds everything."""
    named = {name: output[name] for name in ("logits", "pred_boxes", "pred_ious") if name in output}
    return Predictions(named, list(output.auxiliary_outputs))


def _prediction(logits: Tensor, boxes: Tensor) -> Prediction:
    return {"logits": logits, "pred_boxes": boxes}


def _split(heard: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments under other names, once of the noisy queries (none: no entries) and once of the others."""
    parts = {name: heard[argument] for name, argument in names.items()}
    facts = heard.get("denoising_meta_values")
    if facts is None:
        return {}, parts
    halves = {name: part.split(facts["dn_num_split"], 2) for name, part in parts.items()}
    return {name: half[0] for name, half in halves.items()}, {name: half[1] for name, half in halves.items()}


def _stages(parts: Mapping[str, Tensor]) -> list[Prediction]:
    """``[B, S, Q, …]`` by name → S predictions; as many as the shortest part has."""
    each = (part.unbind(1) for part in parts.values())
    return [dict(zip(parts, values, strict=True)) for values in zip(*each, strict=False)]


def _taught(parts: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[Prediction]:
    """Stages with the last one's classes and distributions, which D-FINE lets the others learn from."""
    if not parts:
        return []
    taught = {"teacher_corners": teacher["pred_corners"][:, -1], "teacher_logits": teacher["logits"][:, -1]}
    return [{**stage, **taught} for stage in _stages(parts)]


def _with_helpers(
    heard: Mapping[str, Any], last: Prediction, earlier: Sequence[Prediction], denoising: Sequence[Prediction]
) -> Predictions:
    """With what is learned beside the last stage, where the configuration wants it."""
    if not heard["config"].auxiliary_loss:
        return Predictions(last)
    encoder = _prediction(heard["enc_topk_logits"], heard["enc_topk_bboxes"])
    return Predictions(last, list(earlier), encoder, list(denoising), heard.get("denoising_meta_values") or {})
