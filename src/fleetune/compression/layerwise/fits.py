# mypy: allow-untyped-defs, allow-untyped-calls
"""Fit scales to groups of weights: the least weighted squared error.

For a group with a scale of its own, scales are tried that put the element of largest |x| near either end of the values, or that
of largest sqrt(h) |x| on each value but 0.  With q the nearest values, least squares gives s and its error; the best s is kept:

    s = sum h q x / sum h q^2            sum h (x - s q)^2 = sum h x^2 - (sum h q x)^2 / sum h q^2

In GGUF's super-blocks a weight is (d k) q - dmin m: k and m are whole numbers of its group, d and dmin fp16 numbers of the block.
"""

import functools
from collections.abc import Sequence
from typing import Final, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from fleetune.common.numba_cache import cached_njit
from fleetune.models.families.number_types import CODEBOOKS, SuperType

# of the largest element from an end, in mean distances of two values: beyond it, and inside
OFFSETS: Final = tuple(0.375 * k for k in range(-4, 5))


def to_half(scale: Tensor) -> Tensor:
    """Round to fp16 and back, without infinities."""
    return scale.clamp(-65504, 65504).to(torch.float16).to(scale.dtype)


def fit_scale(x: Tensor, levels: Tensor, curvature: Tensor | None) -> Tensor:
    """Return the scale [.., R], of either sign, of each row of x [.., R, n]; 0 for a row of zeros.

    levels are the values, rising; curvature [.., n] are the weights h of the squared errors (None: 1).
    """
    shape, x = x.shape[:-1], x.reshape(-1, *x.shape[-2:])
    columns, sizes, n = x.transpose(1, 2).contiguous().numpy(), x.abs(), x.shape[2]
    h = torch.ones(len(x), n, dtype=x.dtype) if curvature is None else curvature.to(x.dtype).reshape(-1, n)
    values = levels.to(x.dtype).numpy()
    unit = (values[-1] - values[0]) / (len(values) - 1)
    ends = np.array([values[end] + unit * offset for end in (0, -1) for offset in OFFSETS], columns.dtype)
    tried = (
        [(sizes, ends)]
        if curvature is None
        else [(sizes, ends), (sizes * h.sqrt()[:, None], values[values != 0])]
    )
    whole = bool((np.diff(values) == 1).all())
    scale, best = np.zeros(x.shape[:2], columns.dtype), np.zeros(x.shape[:2], columns.dtype)
    for counts, places in tried:
        element = x.gather(2, counts.argmax(2, keepdim=True))[..., 0].numpy()
        if whole:
            ends = np.array([values[0], values[-1], 0.5], columns.dtype)
            _fit_whole(columns, h.numpy(), element, places, ends, best, scale)
        else:
            _fit_levels(
                columns, h.numpy(), element, places, values, (values[1:] + values[:-1]) / 2, best, scale
            )
    return torch.from_numpy(scale).reshape(shape)


@cached_njit
def _fit_levels(x, h, element, places, levels, middles, best, scale):
    for g in range(len(x)):
        _fit_group(x[g], h[g], element[g], places, levels, middles, best[g], scale[g])


@numba.njit(nogil=True, error_model="numpy")
def _fit_group(x, h, element, places, levels, middles, best, scale):
    # The inner loops run along the rows without a branch, so that they are compiled to vector instructions.
    n, R = x.shape
    v, q, num, den = np.empty_like(scale), np.empty_like(scale), np.empty_like(scale), np.empty_like(scale)
    for place in places:
        num[:] = 0
        den[:] = 0
        for j in range(n):
            for r in range(R):
                v[r] = x[j, r] * (place / element[r])
                q[r] = levels[0]
            for k in range(len(middles)):
                middle, gap = middles[k], levels[k + 1] - levels[k]
                for r in range(R):
                    q[r] = q[r] + gap if v[r] > middle else q[r]
            for r in range(R):
                num[r] += h[j] * q[r] * x[j, r]
                den[r] += h[j] * q[r] * q[r]
        for r in range(R):
            s = num[r] / den[r]
            if num[r] * s > best[r]:
                best[r] = num[r] * s
                scale[r] = s


@cached_njit
def _fit_whole(x, h, element, places, ends, best, scale):
    for g in range(len(x)):
        _fit_whole_group(x[g], h[g], element[g], places, ends, best[g], scale[g])


@numba.njit(nogil=True, error_model="numpy")
def _fit_whole_group(x, h, element, places, ends, best, scale):
    # `_fit_group` for the whole numbers between the first two of `ends`; the third is 1/2, of their dtype.
    # Ties go down there too.
    n, R = x.shape
    num, den = np.empty_like(scale), np.empty_like(scale)
    for place in places:
        num[:] = 0
        den[:] = 0
        for j in range(n):
            w = h[j]
            for r in range(R):
                q = min(max(np.ceil(x[j, r] * (place / element[r]) - ends[2]), ends[0]), ends[1])
                num[r] += w * q * x[j, r]
                den[r] += w * q * q
        for r in range(R):
            s = num[r] / den[r]
            if num[r] * s > best[r]:
                best[r] = num[r] * s
                scale[r] = s


# of a group's range, taken off at an end; below 0: put on
INSETS: Final = (-0.06, -0.03, 0.0, 0.03, 0.06, 0.1, 0.15, 0.22, 0.3)
# of the largest multiple, where the largest scale is put
PLACES: Final = (1.0, 0.94, 0.86, 1.1)
REFITS: Final = 2  # times that d and dmin are fitted to the codes
LEAST: Final = 2.0**-24  # of fp16, above 0
# with all codes one up and M one S up a group is as good: rounding is not to decide such ties
BETTER: Final = 1 + 1e-6
SINGULAR: Final = 1e-6  # of the determinant's largest value: below it scale and minimum are not told apart


class SuperFit(NamedTuple):
    """The scales of super-blocks of R rows and G groups; all of the weights' dtype."""

    d: Tensor  # [.., R], exact in fp16
    dmin: Tensor  # [.., R], likewise; 0 of a type without a minimum
    k: Tensor  # [.., G, R], whole numbers
    m: Tensor  # [.., G, R], likewise

    def scale(self) -> Tensor:
        """Return the groups' scales, [.., G, R]."""
        return self.d[..., None, :] * self.k

    def offset(self) -> Tensor:
        """Return what is taken off the groups' weights, [.., G, R]."""
        return self.dmin[..., None, :] * self.m

    def shaped(self, lead: Sequence[int]) -> "SuperFit":
        """Return the same with other leading dimensions."""
        parts = zip(self, (1, 1, 2, 2), strict=True)
        return SuperFit(*(part.reshape(*lead, *part.shape[part.dim() - last :]) for part, last in parts))


def fit_block(x: Tensor, of: SuperType, curvature: Tensor | None) -> SuperFit:
    """Fit super-blocks to x [.., R, 256]; curvature [.., 256] are the weights of the squared errors (None: 1).

    1. Each group alone: the scale S of least error, or S and the minimum M.  The ends of the range that the codes cover are
       moved in and out; for each range the weights are rounded to q, for which least squares gives S and M, and so again.
    2. For some d and dmin about those that put the largest S and M at the largest k and m: round S / d and M / dmin, and let
       every group try its neighbours of k and m, with weights rounded anew to each.
    3. Least squares for d and dmin with all q, k and m; round to fp16; let the groups try again.  The best d and dmin are kept.
    """
    work = _Work(x, of, curvature)
    S, M = work.groups()
    best, least = work.started(S, M, 1.0), torch.full_like(S[:, 0], torch.inf)
    for place in PLACES:
        tried = work.started(S, M, place)
        for _ in range(REFITS + 1):
            error = functools.reduce(torch.add, work.settle(tried).unbind(1))
            better = error < least
            least = torch.where(better, error, least)
            best = _chosen(better[:, None], tried, best)
            tried = work.refitted(tried)
    return best.shaped(x.shape[:-2])


def _chosen(better: Tensor, a: SuperFit, b: SuperFit) -> SuperFit:
    """Return a where it is `better` [B, G or 1, R], else b; of d and dmin where that holds for the first group."""
    parts = zip(a, b, (better[:, 0],) * 2 + (better,) * 2, strict=True)
    return SuperFit(*(torch.where(where, one, other) for one, other, where in parts))


def refit_groups(x: Tensor, of: SuperType, curvature: Tensor | None, found: SuperFit) -> SuperFit:
    """Fit k and m of single groups, [.., 1, R], to their weights as they are now, x [.., R, group]; d and dmin stay."""
    work = _Work(x, of, curvature)
    (S, M), own = work.groups(), SuperFit(*(part.clone() for part in found.shaped((len(work.x),))))
    anew = SuperFit(own.d, own.dmin, work.multiples(S, own.d, of.low), work.multiples(M, own.dmin, 0))
    return _chosen(work.settle(anew) < work.settle(own), anew, own).shaped(x.shape[:-2])


def nearest_codes(x: Tensor, of: SuperType, curvature: Tensor | None) -> tuple[SuperFit, Tensor, Tensor]:
    """Fit super-blocks to x [B, R, 256] as the column loop does where it corrects nothing.

    Returns the fit, the weights with their groups' minima added, and the groups' scales, both by group: [B, G, R, ..].
    """
    fit, n = fit_block(x, of, curvature), of.group
    groups = x.unflatten(2, (-1, n)).transpose(1, 2)
    h = None if curvature is None else curvature.unflatten(1, (-1, n))
    # the loop fits all but the first group once more
    later = SuperFit(
        *(part[:, None].expand(-1, fit.k.shape[1] - 1, -1) for part in (fit.d, fit.dmin)),
        *(part[:, 1:, None] for part in (fit.k, fit.m)),
    )
    again = refit_groups(groups[:, 1:], of, None if h is None else h[:, 1:], later)
    fit.k[:, 1:], fit.m[:, 1:] = again.k[:, :, 0], again.m[:, :, 0]
    return fit, groups + fit.offset()[..., None] if of.minimum else groups, fit.scale()


class _Work:
    """The weights of the groups of B blocks, as the kernels take them."""

    def __init__(self, x: Tensor, of: SuperType, curvature: Tensor | None) -> None:
        x = x.reshape(-1, *x.shape[-2:])
        self.of, self.x, self.dtype = of, x, x.dtype
        self.columns = x.transpose(1, 2).contiguous()  # [B, n, R]
        self.curvature = None if curvature is None else curvature.reshape(len(x), -1)
        h = torch.ones_like(x[:, 0]) if self.curvature is None else self.curvature.to(x.dtype)
        tiny = torch.finfo(x.dtype).tiny
        self.h = (
            h / h.amax(1, keepdim=True).clamp(min=tiny)
        ).contiguous()  # so that no sum is beyond the dtype
        levels = torch.tensor(CODEBOOKS[of.codebook] if of.codebook else (), dtype=x.dtype)
        top = (1 << of.bits) - 1
        self.levels = levels.numpy(), ((levels[1:] + levels[:-1]) / 2).numpy()
        # of the steps and of k; 0 and 1 of the dtype, as a constant would widen the arithmetic
        ends = [-of.middle, top - of.middle, of.low, of.high, 0, 1]
        self.ends = np.array(ends, self.columns.numpy().dtype)
        moves = [(a, b) for a in (0, 1, -1) for b in ((0, 1, -1) if of.minimum else (0,))]
        self.moves = np.array(moves, self.ends.dtype)

    def groups(self) -> tuple[Tensor, Tensor]:
        """Fit every group alone: (S, M) [B, G, R], of any value."""
        (B, R, _), n = self.x.shape, self.of.group
        if self.of.minimum:
            S, M = fit_range(self.columns.view(-1, n, R), self.h.view(-1, n), int(self.ends[1]))
            return S.view(B, -1, R), M.view(B, -1, R)
        h = None if self.curvature is None else self.curvature.view(B, -1, n)
        S = fit_scale(self.x.view(B, R, -1, n).transpose(1, 2), self._steps(), h)
        return S, torch.zeros_like(S)

    def started(self, S: Tensor, M: Tensor, place: float) -> SuperFit:
        """Return the super-blocks whose largest S and M are at about `place` of the largest k and m."""
        at = S.abs().argmax(1, keepdim=True)
        end = float(self.of.high if self.of.low == 0 else self.of.low)  # the end that reaches further
        d, dmin = _unit(S.gather(1, at)[:, 0] / (place * end)), _unit(M.amax(1) / (place * self.of.high))
        return SuperFit(d, dmin, self.multiples(S, d, self.of.low), self.multiples(M, dmin, 0))

    def multiples(self, values: Tensor, unit: Tensor, low: int) -> Tensor:
        """Round values [B, G, R] to multiples of unit [B, R] that the type has; 0 where the unit is 0."""
        whole = torch.round(values / unit.masked_fill(unit == 0, torch.inf)[:, None])
        return whole.clamp(low, self.of.high)

    def settle(self, tried: SuperFit) -> Tensor:
        """Give every group the best of its k and m and their neighbours, in place; return their errors, [B, G, R]."""
        error = torch.empty_like(tried.k)
        parts = (tensor.numpy() for tensor in tried)
        _settle(
            self.columns.numpy(), self.h.numpy(), *parts, self.moves, self.ends, *self.levels, error.numpy()
        )
        return error

    def refitted(self, tried: SuperFit) -> SuperFit:
        """Return the same k and m with d and dmin of least error for the codes that they give."""
        sums = torch.zeros(len(self.x), 5, self.x.shape[1], dtype=torch.float64)
        parts = (tensor.numpy() for tensor in tried)
        _sums(self.columns.numpy(), self.h.numpy(), *parts, self.ends, *self.levels, sums.numpy())
        qq, qm, mm, qx, mx = sums.unbind(1)
        d = torch.where(qq > 0, qx / qq, 0.0)
        if not self.of.minimum:
            return SuperFit(to_half(d.to(self.dtype)), tried.dmin, tried.k.clone(), tried.m.clone())
        det = qq * mm - qm * qm
        joint = det > 1e-9 * qq * mm
        both = (qx * mm - mx * qm) / det, (qm * qx - qq * mx) / det
        joint &= (both[0] >= 0) & (both[1] >= 0)
        d = torch.where(joint, both[0], torch.where(mm == 0, d, tried.d.double()))
        dmin = torch.where(joint, both[1], tried.dmin.double())
        return SuperFit(
            to_half(d.to(self.dtype)), to_half(dmin.to(self.dtype)), tried.k.clone(), tried.m.clone()
        )

    def _steps(self) -> Tensor:
        if self.of.codebook:
            return torch.from_numpy(self.levels[0])
        return torch.arange(int(self.ends[0]), int(self.ends[1]) + 1)


def _unit(value: Tensor) -> Tensor:
    """Round to fp16 and back; what is not 0 stays so, since its multiples are not all too small."""
    rounded = to_half(value)
    return torch.where((rounded == 0) & (value != 0), torch.sign(value) * LEAST, rounded)


def fit_range(columns: Tensor, h: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Fit S q - M with q in 0 .. top and M >= 0 to each column of `columns` [B, n, R], h [B, n]: (S, M) [B, R]."""
    S, M = torch.zeros_like(columns[:, 0]), torch.zeros_like(columns[:, 0])
    kind = columns.numpy().dtype
    insets = np.array([(a, b) for a in INSETS for b in INSETS], kind)
    steps = np.array([0, 1, top, SINGULAR, BETTER], kind)
    low, high = columns.amin(1).clamp(max=0), columns.amax(1)
    _fit_range(columns.numpy(), h.numpy(), low.numpy(), high.numpy(), insets, steps, S.numpy(), M.numpy())
    return S, M


@cached_njit
def _fit_range(x, h, low, high, insets, steps, S, M):
    for b in range(len(x)):
        _fit_range_of_group(x[b], h[b], low[b], high[b], insets, steps, S[b], M[b])


@numba.njit(nogil=True, error_model="numpy")
def _fit_range_of_group(x, h, low, high, insets, steps, S, M):
    # S q + c, c = -M, by least squares for q rounded to a range, and for q rounded to that S and c
    n, R = x.shape
    zero, one, top = steps[0], steps[1], steps[2]
    s, c, best = np.zeros_like(S), np.zeros_like(S), np.zeros_like(S)
    inverse = np.zeros_like(S)
    qq, qx, q1, sx = np.zeros_like(S), np.zeros_like(S), np.zeros_like(S), np.zeros_like(S)
    s1 = zero
    for j in range(n):
        s1 += h[j]
        for r in range(R):
            sx[r] += h[j] * x[j, r]
    for r in range(R):  # all codes 0
        mean = sx[r] / s1 if s1 > zero else zero
        S[r] = zero
        M[r] = -mean if mean < zero else zero
        best[r] = mean * sx[r] if mean < zero else zero
    for inset in insets:
        for r in range(R):
            width = high[r] - low[r]
            c[r] = low[r] + inset[0] * width
            s[r] = (width - (inset[0] + inset[1]) * width) / top
        for _ in range(2):
            for r in range(R):
                inverse[r] = one / s[r] if s[r] > zero else zero
                qq[r] = zero
                qx[r] = zero
                q1[r] = zero
            for j in range(n):
                w = h[j]
                for r in range(R):
                    q = np.rint((x[j, r] - c[r]) * inverse[r])
                    q = zero if q < zero else q
                    q = top if q > top else q
                    q1[r] += w * q
                    qq[r] += w * q * q
                    qx[r] += w * q * x[j, r]
            for r in range(R):
                det = s1 * qq[r] - q1[r] * q1[r]
                good = det > steps[3] * s1 * qq[r]
                a = (s1 * qx[r] - q1[r] * sx[r]) / det if good else zero
                b = (qq[r] * sx[r] - q1[r] * qx[r]) / det if good else one
                if b > zero:  # M >= 0
                    b = zero
                    a = qx[r] / qq[r] if qq[r] > zero else zero
                gain = a * qx[r] + b * sx[r]
                s[r] = a
                c[r] = b
                if gain > best[r] * steps[4]:
                    best[r] = gain
                    S[r] = a
                    M[r] = -b


@cached_njit
def _settle(x, h, d, dmin, k, m, moves, ends, levels, middles, error):
    for b in range(len(x)):
        _settle_block(x[b], h[b], d[b], dmin[b], k[b], m[b], moves, ends, levels, middles, error[b])


@numba.njit(nogil=True, error_model="numpy")
def _settle_block(x, h, d, dmin, k, m, moves, ends, levels, middles, error):
    # The inner loops run along the rows without a branch, so that they are compiled to vector instructions.
    G, R = k.shape
    n = len(x) // G
    zero, one = ends[4], ends[5]
    kk, mm, S, M = np.empty_like(d), np.empty_like(d), np.empty_like(d), np.empty_like(d)
    inverse, e, best = np.empty_like(d), np.empty_like(d), np.empty_like(d)
    bk, bm, q = np.empty_like(d), np.empty_like(d), np.empty_like(d)
    for g in range(G):
        for r in range(R):
            best[r] = np.inf
            bk[r] = k[g, r]
            bm[r] = m[g, r]
        for move in moves:
            for r in range(R):
                kk[r] = min(max(k[g, r] + move[0], ends[2]), ends[3])
                mm[r] = min(max(m[g, r] + move[1], zero), ends[3])
                S[r] = d[r] * kk[r]
                M[r] = dmin[r] * mm[r]
                inverse[r] = one / S[r] if S[r] != zero else zero
                e[r] = zero
            for j in range(g * n, g * n + n):
                _round(x[j], M, inverse, ends, levels, middles, q)
                for r in range(R):
                    off = x[j, r] + M[r] - S[r] * q[r]
                    e[r] += h[j] * off * off
            for r in range(R):
                better = e[r] < best[r]
                best[r] = e[r] if better else best[r]
                bk[r] = kk[r] if better else bk[r]
                bm[r] = mm[r] if better else bm[r]
        for r in range(R):
            k[g, r] = bk[r]
            m[g, r] = bm[r]
            error[g, r] = best[r]


@cached_njit
def _sums(x, h, d, dmin, k, m, ends, levels, middles, sums):
    for b in range(len(x)):
        _sums_of_block(x[b], h[b], d[b], dmin[b], k[b], m[b], ends, levels, middles, sums[b])


@numba.njit(nogil=True, error_model="numpy")
def _sums_of_block(x, h, d, dmin, k, m, ends, levels, middles, sums):
    # over all groups: sum h of a a, a m, m m, a x, m x with a = k q
    G, R = k.shape
    n = len(x) // G
    zero, one = ends[4], ends[5]
    S, M, inverse, q = np.empty_like(d), np.empty_like(d), np.empty_like(d), np.empty_like(d)
    for g in range(G):
        for r in range(R):
            S[r] = d[r] * k[g, r]
            M[r] = dmin[r] * m[g, r]
            inverse[r] = one / S[r] if S[r] != zero else zero
        for j in range(g * n, g * n + n):
            _round(x[j], M, inverse, ends, levels, middles, q)
            for r in range(R):
                a = k[g, r] * q[r]
                sums[0, r] += h[j] * a * a
                sums[1, r] += h[j] * a * m[g, r]
                sums[2, r] += h[j] * m[g, r] * m[g, r]
                sums[3, r] += h[j] * a * x[j, r]
                sums[4, r] += h[j] * m[g, r] * x[j, r]


@numba.njit(nogil=True, error_model="numpy")
def _round(x, M, inverse, ends, levels, middles, q):
    # the steps of one column's weights
    R = len(x)
    if len(levels):
        for r in range(R):
            q[r] = levels[0]
        for i in range(len(middles)):
            middle, gap = middles[i], levels[i + 1] - levels[i]
            for r in range(R):
                q[r] = q[r] + gap if x[r] * inverse[r] > middle else q[r]
        return
    for r in range(R):
        v = np.rint((x[r] + M[r]) * inverse[r])
        v = ends[0] if v < ends[0] else v
        q[r] = ends[1] if v > ends[1] else v
