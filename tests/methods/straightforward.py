"""Every loss as its paper writes it, step by step and without regard to cost or extreme logits.

The methods must give the same values and gradients (`test_straightforward.py`) in less time
(``python -m tests.programs.loss_times``). Labels are indices ``[B]`` or, where a loss takes them, mixed rows
``[B, K]``; factors are left out where they only multiply a whole loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def kd(student, teacher, temperature=1.0):
    """Cross-entropy of the softened distributions."""
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return -(temperature**2) * (q * p.log()).sum(1).mean()


def deit_soft(student, teacher, temperature=1.0):
    """Divergence of the softened distributions."""
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * (q * (q.log() - p.log())).sum(1).mean()


def one_hot(label, classes, dtype):
    return F.one_hot(label, classes).to(dtype) if label.ndim == 1 else label.to(dtype)


def others(values, label):
    """Drop the columns `label` ``[B, J]``: ``[B, K] → [B, K - J]``."""
    keep = torch.ones_like(values, dtype=torch.bool).scatter_(1, label, False)
    return values[keep].reshape(len(values), -1)


def nkd(student, teacher, label, temperature=1.0, gamma=1.5):
    """Target part and part of the other classes among themselves, as a sum."""
    label = (label if label.ndim == 1 else label.argmax(1))[:, None]
    log_p, q = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    target = -(q.gather(1, label) * log_p.gather(1, label)).mean()
    log_p = F.log_softmax(others(student, label) / temperature, dim=1)
    q = F.softmax(others(teacher, label) / temperature, dim=1)
    return target - gamma * temperature**2 * (q * log_p).sum(1).mean()


def dkd(student, teacher, label, temperature=1.0, alpha=1.0, beta=0.5):
    """Binary part and part of the other classes, as a sum; a label is removed by taking 1000 from its logit."""
    target = F.one_hot(label, student.shape[1]).bool()
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    p, q = (torch.stack([(rows * target).sum(1), (rows * ~target).sum(1)], dim=1) for rows in (p, q))
    binary = F.kl_div(p.log(), q, reduction="sum") / len(label)
    log_p = F.log_softmax(student / temperature - 1000.0 * target, dim=1)
    q = F.softmax(teacher / temperature - 1000.0 * target, dim=1)
    rest = F.kl_div(log_p, q, reduction="sum") / len(label)
    return temperature**2 * (alpha * binary + beta * rest)


def wsld(student, teacher, label, temperature=2.0):
    """Softened cross-entropy, weighted by how much worse than the teacher the student does on the label."""
    rows = one_hot(label, student.shape[1], student.dtype)
    ours, theirs = (-(rows * F.log_softmax(logits.detach(), dim=1)).sum(1) for logits in (student, teacher))
    weights = 1 - (-(ours / (theirs + 1e-7)).clamp(min=0)).exp()
    q, log_p = F.softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    return temperature**2 * (weights * -(q * log_p).sum(1)).mean()


def uskd(student, weak, label, alpha=1.0, beta=0.1, mu=0.005):
    """Target, non-target and weak part, as a sum, from the logits of the student and of its weak head."""
    if label.ndim == 1:
        targets, values = label[:, None], torch.ones_like(student[:, :1])
    else:
        values, targets = (found[:, :2] for found in label.sort(dim=1, descending=True, stable=True))
    p, log_p = F.softmax(student, dim=1), F.log_softmax(student, dim=1)
    squares = p.gather(1, targets) ** 2
    weights = (squares + values - squares.mean(0, keepdim=True)).detach()
    weights[values == 0] = 0
    target = -(weights * log_p.gather(1, targets)).sum(1).mean()

    smooth = 0.9 * one_hot(label, student.shape[1], student.dtype) + 0.1 / student.shape[1]
    supervised = -(smooth * F.log_softmax(weak, dim=1)).sum(1).mean()

    sigma = F.softmax(weak, dim=1)
    score = sum(g / (1 - g.gather(1, targets).sum(1, keepdim=True) + 1e-6) for g in (sigma, p)).detach()
    order = score.sort(dim=1, descending=True, stable=True).indices
    inverse = 1 / torch.arange(1, score.shape[1] + 1, dtype=score.dtype).repeat(len(score), 1)
    zipf = others(inverse.gather(1, order.argsort(dim=1)), targets)
    zipf = zipf / zipf.sum(1, keepdim=True)
    nontarget = -(zipf * F.log_softmax(others(student, targets), dim=1)).sum(1).mean()
    return alpha * target + beta * nontarget + mu * supervised


def mgd(student, teacher, align, generation, noise, mask_ratio=0.15):
    """Rebuild the teacher's map ``[B, C, H, W]`` from the student's, without the channels that `noise` drops."""
    kept = torch.where(noise < mask_ratio, 0.0, 1.0).to(student.dtype)
    return F.mse_loss(generation(align(student) * kept), teacher, reduction="sum") / len(student)


def srrl(student, teacher, logits, connector, head, alpha=1.0, beta=1.0):
    """Pooled features, and what the teacher's classifier makes of them, as a sum."""
    ours = connector(student).mean((2, 3))
    return alpha * F.mse_loss(ours, teacher) + beta * F.mse_loss(head(ours), logits)


def vitkd(low_s, low_t, high_s, high_t, aligns, align, mask, generation, noise, alpha=3e-5, beta=3e-6, ratio=0.5):
    """Imitation of early blocks and generation of the last one, as a sum, on patch tokens ``[B, N, D]``."""
    batch, tokens, width = high_t.shape
    ours = torch.stack([each(low) for each, low in zip(aligns, low_s, strict=True)], dim=1)
    mimic = F.mse_loss(ours, torch.stack(low_t, dim=1), reduction="sum") / batch

    kept = int(tokens * (1 - ratio))
    order = noise.argsort(dim=1, stable=True)
    back = order.argsort(dim=1)
    hidden = torch.ones_like(noise, dtype=high_t.dtype)
    hidden[:, :kept] = 0
    hidden = hidden.gather(1, back)[:, :, None]
    x = align(high_s)
    seen = x.gather(1, order[:, :kept, None].expand(-1, -1, width))
    filled = torch.cat([seen, mask.expand(batch, tokens - kept, -1)], dim=1)
    filled = filled.gather(1, back[:, :, None].expand(-1, -1, width))
    side = math.isqrt(tokens)
    rebuilt = generation(filled.transpose(1, 2).reshape(batch, width, side, side)).flatten(2).transpose(1, 2)
    generated = F.mse_loss(rebuilt * hidden, high_t * hidden, reduction="sum") / batch
    return alpha * mimic + beta / ratio * generated


def relations(student, teacher, chosen):
    """Terms sample, patch and rand of block outputs ``[B, N, D]``, as ``[3]``."""
    ours, theirs = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    kinds = (
        (ours.transpose(0, 1), theirs.transpose(0, 1)),
        (ours, theirs),
        (ours.flatten(0, 1)[chosen], theirs.flatten(0, 1)[chosen]),
    )
    return torch.stack([(t @ t.transpose(-1, -2) - s @ s.transpose(-1, -2)).square().mean() for s, t in kinds])


def manifold(students, teachers, chosen, w_sample=0.1, w_patch=4.0, w_rand=0.2):
    """The three terms over pairs of blocks, as a sum."""
    terms = [relations(*pair) for pair in zip(students, teachers, chosen, strict=True)]
    return (torch.stack(terms).mean(0) * terms[0].new_tensor([w_sample, w_patch, w_rand])).sum()


def cls_kd(students, teachers, projector, w_cls=1.0, w_atn=2.0, last_w=4.0):
    """Class tokens and their similarity to the patches over pairs of blocks, as a sum; without manifold terms."""
    tokens, maps = [], []
    for student, teacher in zip(students, teachers, strict=True):
        ours, theirs = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        tokens.append((theirs[:, 0] - projector(ours[:, 0])).square().mean())
        near = [x[:, :1] @ x[:, 1:].transpose(1, 2) for x in (ours, theirs)]
        maps.append((near[1] - near[0]).square().mean())
    total = 0.0
    for factor, losses in ((w_cls, torch.stack(tokens)), (w_atn, torch.stack(maps))):
        weights = len(losses) * losses / losses.sum()
        emphasis = losses.new_tensor([1.0] * (len(losses) - 1) + [last_w])
        total = total + factor * (emphasis * weights * losses).mean()
    return total


def vkd(tokens, feature, student, teacher, projector, alpha=1.0, gamma=1.0):
    """Projected patch tokens ``[B, N, D]`` against a normalised map, and the divergence of logits, as a sum."""
    pooled = feature.mean((2, 3))
    wanted = F.layer_norm(pooled, pooled.shape[1:])
    return alpha * F.smooth_l1_loss(projector(tokens.mean(1)), wanted) + gamma * deit_soft(student, teacher)


def orthogonal_linear(inputs, outputs, dtype=torch.float32):
    """The projector of VkD: PyTorch's own parametrisation with its defaults."""
    return nn.utils.parametrizations.orthogonal(nn.Linear(inputs, outputs, bias=False, dtype=dtype))


def cosine_transform(size, dtype):
    """DCT-II as a matrix ``[size, size]``."""
    places = torch.arange(size, dtype=dtype)
    return 2 * torch.cos(math.pi / size * places[:, None] * (places[None] + 0.5))


def without_zero_frequency(tokens, grid):
    """Remove the first coefficient of the 2-d cosine transform of tokens ``[B, H·W, C]``."""
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    rows, columns = (cosine_transform(size, tokens.dtype) for size in grid)
    spectrum = rows @ maps @ columns.T
    keep = torch.ones_like(spectrum)
    keep[..., 0, 0] = 0
    return (torch.linalg.inv(rows) @ (spectrum * keep) @ torch.linalg.inv(columns).T).flatten(2).transpose(1, 2)


def mimicking(student, teacher, grid, alternative):
    """Squared distance of unit tokens ``[B, H·W, C]``, of what the zero frequency leaves if `alternative`."""
    if alternative:
        student, teacher = (without_zero_frequency(tokens, grid) for tokens in (student, teacher))
    return (F.normalize(student, dim=2) - F.normalize(teacher, dim=2)).square().sum((1, 2)).mean()


class CrossAttentionProjector(nn.Module):
    """ScaleKD's projector with a layer per equation, weights taken from ours; queries are repeated per image."""

    def __init__(self, ours):
        super().__init__()
        self.conv, self.conv_norm, self.position, self.table = ours.conv, ours.conv_norm, ours.position, ours.table
        self.query_in, self.query, self.out, self.norm = ours.query_in, ours.query, ours.out, ours.norm
        self.expand, self.contract = ours.expand, ours.contract
        self.heads, self.scale = ours.heads, ours.scale
        self.key, self.value = ours.key, ours.value

    def forward(self, feature, queries=None):
        seen = F.relu(self.conv_norm(self.conv(feature))) + self.position
        seen = seen.flatten(2).transpose(1, 2)
        queries = self.table.expand(len(feature), -1, -1) if self.table is not None else queries
        parts = self.query(F.relu(self.query_in(queries))), self.key(seen), self.value(seen)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = (self.scale * query @ key.transpose(2, 3)).softmax(-1) @ value
        normed = self.norm(self.out(attended.transpose(1, 2).flatten(2)))
        return normed + self.contract(F.relu(self.expand(normed)))


def dist(student, teacher, temperature=1.0, beta=1.0, gamma=1.0):
    """Correlations within samples and within classes, as a sum."""

    def unlike(ours, theirs):
        ours, theirs = ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
        return 1 - ((ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1) + 1e-8)).mean()

    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * (beta * unlike(p, q) + gamma * unlike(p.T, q.T))


def sp(student, teacher):
    """Normalised similarities of the images of a batch."""
    ours, theirs = (F.normalize(rows.flatten(1) @ rows.flatten(1).T, dim=1) for rows in (student, teacher))
    return (theirs - ours).square().sum() / len(student) ** 2


def pkt(student, teacher):
    """Divergence of the probabilities with which images pick their neighbours, a mean over all pairs."""

    def picked(rows):
        rows = rows / (rows.square().sum(1, keepdim=True).sqrt() + 1e-7)
        near = (rows @ rows.T + 1) / 2
        return near / near.sum(1, keepdim=True)

    p, q = picked(student), picked(teacher)
    return (q * torch.log((q + 1e-7) / (p + 1e-7))).mean()


def rkd(student, teacher, distance_weight=25.0, angle_weight=50.0, squared=False):
    """Distances over their mean, and cosines of all angles from the differences ``[B, B, D]`` themselves, as a sum."""

    def relative(rows):
        squares = rows.square().sum(1)
        found = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=1e-12)
        found = (found if squared else found.sqrt()) * (1 - torch.eye(len(rows), dtype=rows.dtype))
        return found / found[found > 0].mean()

    def cosines(rows):
        directions = F.normalize(rows[None] - rows[:, None], dim=2)
        return directions @ directions.transpose(1, 2)

    distance, angle = (F.smooth_l1_loss(form(student), form(teacher)) for form in (relative, cosines))
    return distance_weight * distance + angle_weight * angle


def attention(feature, p=2):
    return F.normalize(feature.pow(p).mean(1).flatten(1), dim=1)


def pooled(feature, other):
    """A map, averaged to a square of the other's height where it is higher."""
    side = other.shape[2]
    return F.adaptive_avg_pool2d(feature, (side, side)) if feature.shape[2] > side else feature


def at(students, teachers):
    """Squared differences of attention maps, summed over stages; the higher map is pooled to the other's height."""
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        ours, theirs = pooled(student, teacher), pooled(teacher, student)
        total = total + (attention(ours) - attention(theirs)).square().mean()
    return total


def vid(students, teachers, stages):
    """Negative log-likelihoods of the teacher's maps, summed over stages, from regressors and λ per channel."""
    total = 0.0
    for student, teacher, stage in zip(students, teachers, stages, strict=True):
        ours, theirs = pooled(student, teacher), pooled(teacher, student)
        variance = torch.log(1 + stage.log_scale.exp()) + 1e-5
        variance = variance.view(1, -1, 1, 1).expand_as(theirs)
        total = total + (0.5 * ((stage.regressor(ours) - theirs) ** 2 / variance + variance.log())).mean()
    return total


def contrast(vectors, bank, chosen, temperature=0.07):
    """CRD's loss of embeddings ``[B, D]`` against the rows `chosen` ``[B, K + 1]`` of a bank, Z from these scores."""
    scores = torch.bmm(bank[chosen], vectors[:, :, None])[:, :, 0].div(temperature).exp()
    odds = scores / (scores.detach().mean() * len(bank))
    share = (chosen.shape[1] - 1) / len(bank)
    positive = torch.log(odds[:, 0] / (odds[:, 0] + share + 1e-7))
    negative = torch.log(share / (odds[:, 1:] + share + 1e-7))
    return -(positive.sum() + negative.sum()) / len(vectors)


def crd(student, teacher, embeddings, banks, chosen):
    """Both losses of CRD's first step, as a sum: of each side's embedding against the other side's bank."""
    ours, theirs = (F.normalize(layer(x), dim=1) for layer, x in zip(embeddings, (student, teacher), strict=True))
    return contrast(ours, banks[1], chosen) + contrast(theirs, banks[0], chosen)


def ttm(student, teacher, gamma, weighted=False):
    """Divergence from the teacher's probabilities to a power; `weighted` by the power's sum (WTTM)."""
    powers = F.softmax(teacher, dim=1) ** gamma
    total = powers.sum(1, keepdim=True)
    q, log_p = powers / total, F.log_softmax(student, dim=1)
    found = (q * (q.log() - log_p)).sum(1)
    return (total[:, 0] * found if weighted else found).mean()


def mlkd(student, teacher, strong_student, strong_teacher, temperature=1.0, executed=False):
    """Samples, classes and batches at five temperatures, as a sum, from logits of two views."""
    certain = F.softmax(teacher, dim=1)
    masks = [each <= each.median() if len(each) % 2 else each <= each.sort().values[len(each) // 2 - 1 :][:2].mean()
             for each in (certain.max(1).values, certain.sum(0))]  # fmt: skip
    unsure, rare = (mask.to(student.dtype).mean() if executed else mask.to(student.dtype) for mask in masks)
    total = 0.0
    for place, tau in enumerate((temperature, 3.0, 5.0, 2.0, 6.0)):
        log_p, q = F.log_softmax(student / tau, dim=1), F.softmax(teacher / tau, dim=1)
        weak = (q * (q.log() - log_p)).sum(1)
        log_p_strong, q_strong = F.log_softmax(strong_student / tau, dim=1), F.softmax(strong_teacher / tau, dim=1)
        strong = weak if executed and place > 2 else (q_strong * (q_strong.log() - log_p_strong)).sum(1)
        p = log_p.exp()
        classes = ((p.T @ p - q.T @ q) ** 2).sum(1) / p.shape[1]
        batch = ((p @ p.T - q @ q.T) ** 2).sum(1) / len(p)
        total = total + tau**2 * ((unsure * weak).mean() + strong.mean()) + (rare * classes).sum()
        total = total + (unsure * batch).sum()
    return total


def regions(feature, classifier, scales=(1, 2, 4)):
    """Logits ``[B, R, K]`` of every region's own vector; larger regions are pooled from the 4×4 grid."""
    cells = F.adaptive_avg_pool2d(feature, 4)
    vectors = torch.cat([F.adaptive_avg_pool2d(cells, scale).flatten(2) for scale in scales], dim=2)
    return classifier(vectors.transpose(1, 2))


def sdd(student, teacher, label, temperature=4.0, alpha=1.0, beta=8.0):
    """DKD of every region's logits ``[B, R, K]``, twice where the teacher is right about one of region and whole."""
    right = teacher.argmax(2) == label[:, None]
    weights = 1.0 + (right != right[:, :1]).to(student.dtype)
    hit = F.one_hot(label, student.shape[2]).bool()[:, None]
    p, q = (F.softmax(logits / temperature, dim=2) for logits in (student, teacher))
    p, q = (torch.stack([(rows * hit).sum(2), (rows * ~hit).sum(2)], dim=2) for rows in (p, q))
    binary = F.kl_div(p.log(), q, reduction="none").sum(2)
    log_p = F.log_softmax(student / temperature - 1000.0 * hit, dim=2)
    q = F.softmax(teacher / temperature - 1000.0 * hit, dim=2)
    rest = F.kl_div(log_p, q, reduction="none").sum(2)
    return temperature**2 * (weights * (alpha * binary + beta * rest)).mean()


def ofa(student, teacher, label, eps, temperature=1.0):
    """Cross-entropy with the teacher's probabilities, of which the label's is made more of."""
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    hit = F.one_hot(label, p.shape[1])
    return -(((q + hit) ** eps - hit) * p.log()).sum(1).mean()


def ofd(students, teachers, connectors, margins):
    """Squared distances where the student is above the margin or the teacher above 0, with factors 1, 1/2, 1/4, …"""
    total, last = 0.0, len(students) - 1
    for place, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        ours = connectors[place](student)
        goal = F.adaptive_avg_pool2d(teacher, ours.shape[2:])
        goal, seen = torch.maximum(goal, margins[place].view(1, -1, 1, 1)), goal > 0
        counted = ((ours > goal) | seen).to(ours.dtype)
        total = total + (counted * (ours - goal) ** 2).sum() / len(ours) / 2 ** (last - place)
    return total


def hierarchical(feature, goal):
    """ReviewKD's distance: of the maps, and of both pooled to 4, 2 and 1 cells a side."""
    total, weights, weight = F.mse_loss(feature, goal), 1.0, 1.0
    for cells in (4, 2, 1):
        if cells < feature.shape[2]:
            weight /= 2
            total = total + weight * F.mse_loss(*(F.adaptive_avg_pool2d(map_, cells) for map_ in (feature, goal)))
            weights += weight
    return total / weights


def reviewkd(students, teachers, levels):
    """The distances of all levels, as a sum; the features are pooled vectors first, then maps from the last one on."""
    total, review = 0.0, None
    for student, teacher, level in zip(students, teachers, levels, strict=True):
        student, teacher = (x[:, :, None, None] if x.ndim == 2 else x for x in (student, teacher))
        fused = level.reduce(student)
        if review is not None:
            review = F.interpolate(review, fused.shape[2:], mode="nearest")
            gates = level.gate(torch.cat([fused, review], dim=1)).sigmoid()
            fused = fused * gates[:, 0, None] + review * gates[:, 1, None]
        review = F.interpolate(fused, teacher.shape[2:], mode="nearest")
        total = total + hierarchical(level.expand(review), teacher)
    return total
