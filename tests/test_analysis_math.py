"""The analyses' functions against closed forms in float64, and against input that cannot be used."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model
from torch import nn

import hf_fda.analysis.landscapes
import hf_fda.analysis.losses
import hf_fda.analysis.matrices
import hf_fda.analysis.moves
import hf_fda.analysis.planes
import hf_fda.analysis.similarities
import hf_fda.analysis.spectra
import hf_fda.analysis.subspaces
from hf_fda.analysis import (
    anchor_gradients,
    axis,
    effective_rank,
    gradient_agreement,
    gram,
    landscape,
    move,
    plane,
    projection_energy,
    similarity,
    spectrum,
    states_gradients,
    tail,
)
from hf_fda.analysis.losses import loss_of
from hf_fda.analysis.moves import Bought, Move
from hf_fda.anchors.gradients import induced_gradients
from hf_fda.blocks import UnitCall
from hf_fda.divergence.measures import Target
from hf_fda.errors import InputError
from hf_fda.states import UnitStates
from hf_fda.states.unit_states import Ragged

DOUBLE = torch.float64


def orthonormal(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE)).Q


def with_values(values: list[float], rows: int = 40, size: int = 24) -> torch.Tensor:
    """A matrix (rows, size) with these singular values."""
    left, right = orthonormal(rows, 1)[:, : len(values)], orthonormal(size, 2)[: len(values)]
    return left @ torch.tensor(values, dtype=DOUBLE).diag() @ right


def two_layers() -> tuple[nn.Module, nn.Module, UnitCall]:
    torch.manual_seed(0)
    base, source = (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).double() for _ in range(2))
    return base.requires_grad_(False), source.requires_grad_(False), UnitCall(size=6, tokens=3)


@pytest.mark.parametrize(
    "module",
    [
        hf_fda.analysis.landscapes,
        hf_fda.analysis.moves,
        hf_fda.analysis.planes,
        hf_fda.analysis.similarities,
        hf_fda.analysis.spectra,
        hf_fda.analysis.subspaces,
    ],
)
def test_examples_in_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


class TestSpectrum:
    def test_power_law_is_found(self) -> None:
        values = [rank**-1.7 for rank in range(1, 21)]
        found = spectrum(with_values(values).reshape(8, 5, 24))
        assert found.values[:20] == pytest.approx(values)
        assert found.tail is not None
        assert (found.tail.first, found.tail.last) == (2, 10)
        assert found.tail.exponent == pytest.approx(1.7)
        assert found.tail.fit == pytest.approx(1.0)
        assert found.shares[0] == 1.0

    def test_ranks_of_the_tail_can_be_chosen(self) -> None:
        found = spectrum(with_values([8.0, 8.0, 8.0, *(rank**-2.0 for rank in range(4, 13))]), ranks=(4, 12))
        assert found.tail is not None
        assert found.tail.exponent == pytest.approx(2.0)

    @pytest.mark.parametrize("count", [1, 3, 17])
    def test_effective_rank_of_equal_values_is_their_number(self, count: int) -> None:
        assert spectrum(with_values([2.5] * count)).effective_rank == pytest.approx(count)

    def test_effective_rank_of_two_values(self) -> None:
        share = 0.75
        entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
        assert effective_rank([3.0, 1.0]) == pytest.approx(math.exp(entropy))
        assert effective_rank([0.0, 0.0]) == 0.0

    def test_centring_takes_the_mean_away(self) -> None:
        noise = torch.randn(50, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        left = noise - noise.mean(0)
        assert spectrum(left + 100.0, centred=True).values == pytest.approx(spectrum(left).values)

    def test_few_values_have_no_tail(self) -> None:
        assert spectrum(with_values([3.0, 2.0, 1.0])).tail is None

    def test_tail_of_constant_values(self) -> None:
        assert tail([1.0] * 5, 1, 5) == hf_fda.analysis.Tail(0.0, 1, 5, 1.0)

    @pytest.mark.parametrize("ranks", [(0, 3), (3, 3), (5, 3), (1, 30)])
    def test_ranks_that_are_not_there(self, ranks: tuple[int, int]) -> None:
        with pytest.raises(InputError, match="choose others"):
            spectrum(torch.eye(8), ranks=ranks)


@pytest.mark.parametrize("use", [spectrum, lambda own: projection_energy(own, torch.eye(3), [1])])
@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (torch.full((4, 3), math.nan), "not all finite"),
        (torch.tensor([[1.0, math.inf, 0.0]]), "not all finite"),
        (torch.zeros(0, 3), "there are none"),
        (torch.zeros(3), "as rows"),
    ],
)
def test_vectors_that_cannot_be_used(use: Any, vectors: torch.Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        use(vectors)


class TestProjectionEnergy:
    @pytest.mark.parametrize("degrees", [0, 30, 60, 90])
    def test_angle_of_two_lines(self, degrees: float) -> None:
        angle = math.radians(degrees)
        line = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=DOUBLE)
        found = projection_energy(line, torch.tensor([[5.0, 0.0, 0.0]]), [1])
        assert found.shares[0] == pytest.approx(math.cos(angle) ** 2, abs=1e-12)
        assert found.expected == (pytest.approx(1 / 3),)
        assert found.best == (pytest.approx(1.0),)

    def test_vectors_on_themselves_are_at_their_best(self) -> None:
        vectors = with_values([4.0, 2.0, 1.0])
        found = projection_energy(vectors, vectors, [1, 2, 3])
        assert found.shares == pytest.approx((16 / 21, 20 / 21, 1.0))
        assert found.best == pytest.approx(found.shares)

    def test_random_subspaces_hold_k_of_d(self) -> None:
        vectors = with_values([4.0, 2.0, 1.0])
        shares = [
            projection_energy(
                vectors, torch.randn(6, 24, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)), [6]
            )
            for seed in range(200)
        ]
        assert sum(own.shares[0] for own in shares) / 200 == pytest.approx(shares[0].expected[0], abs=0.02)

    @pytest.mark.parametrize("k", [0, 3, 9])
    def test_k_larger_than_there_are_directions(self, k: int) -> None:
        with pytest.raises(InputError, match=f"k is {k}; 2 vectors of 8 entries have 1 to 2 directions"):
            projection_energy(torch.eye(8), torch.eye(8)[:2], [1, k])

    def test_vectors_of_other_sizes_or_without_direction(self) -> None:
        with pytest.raises(InputError, match="8 entries, those projected on 7"):
            projection_energy(torch.eye(8), torch.eye(7), [1])
        with pytest.raises(InputError, match="all zero"):
            projection_energy(torch.zeros(2, 8), torch.eye(8), [1])


class TestSimilarity:
    def test_cosines_over_parts_are_those_of_the_whole(self) -> None:
        vectors = torch.randn(3, 30, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        found = similarity(["a", "b", "c"], zip(*(own.split([10, 4, 16]) for own in vectors), strict=True))
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        torch.testing.assert_close(torch.tensor(found.cosines, dtype=DOUBLE), unit @ unit.T)
        assert found.norms == pytest.approx(vectors.norm(dim=1).tolist())
        apart = (unit @ unit.T).fill_diagonal_(0).sum() / 6
        assert found.mean == pytest.approx(float(apart))

    def test_a_source_that_does_not_move(self) -> None:
        found = similarity(["a", "still"], [(torch.ones(3), torch.zeros(3))])
        assert found.cosines == ((1.0, 0.0), (0.0, 0.0))

    def test_what_cannot_be_compared(self) -> None:
        with pytest.raises(InputError, match="no vectors"):
            similarity(["a"], [])
        with pytest.raises(InputError, match="not all finite"):
            similarity(["a", "b"], [(torch.ones(2), torch.full((2,), math.nan))])


class TestPlane:
    def test_coordinates_keep_distances(self) -> None:
        u, v, w = torch.randn(3, 50, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        found = plane(gram([(u, v)], 2))
        points = found.points
        assert math.dist(points["base"], points["first"]) == pytest.approx(float(u.norm()))
        assert math.dist(points["base"], points["second"]) == pytest.approx(float(v.norm()))
        assert math.dist(points["first"], points["second"]) == pytest.approx(float((u - v).norm()))
        own = found.project(float(u @ w), float(v @ w), float(w @ w))
        a, b = found.weights(own.x, own.y)
        nearest = torch.linalg.lstsq(torch.stack([u, v], 1), w[:, None]).solution.flatten()
        assert (a, b) == pytest.approx(tuple(nearest.tolist()))
        assert own.off == pytest.approx(float((w - a * u - b * v).norm()))

    def test_models_on_it_are_at_their_points(self) -> None:
        found = plane(torch.tensor([[4.0, 2.0], [2.0, 10.0]], dtype=DOUBLE))
        assert found.weights(*found.points["first"]) == pytest.approx((1, 0))
        assert found.weights(*found.points["second"]) == pytest.approx((0, 1))

    @pytest.mark.parametrize(
        "products", [[[1.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]], [[1.0, math.nan], [math.nan, 1.0]]]
    )
    def test_no_plane(self, products: list[list[float]]) -> None:
        with pytest.raises(InputError, match="no plane"):
            plane(torch.tensor(products))


class TestLandscape:
    def test_a_quadratic(self) -> None:
        u, v, centre = torch.randn(3, 20, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        found = plane(gram([(u, v)], 2))
        on_plane = found.project(float(u @ centre), float(v @ centre), float(centre @ centre))

        def loss(a: float, b: float) -> dict[str, float]:
            return {"one": float((a * u + b * v - centre).square().sum()), "two": 0.0}

        x, y = axis([on_plane.x - 1, on_plane.x + 1], 5), axis([on_plane.y - 1, on_plane.y + 1], 7)
        seen = landscape(found, x, y, loss, {"centre": on_plane}, {"path": [on_plane]})
        expected = [[(a - on_plane.x) ** 2 + (b - on_plane.y) ** 2 + on_plane.off**2 for a in x] for b in y]
        torch.testing.assert_close(torch.tensor(seen.losses["one"]), torch.tensor(expected))
        assert seen.lowest == pytest.approx((on_plane.x, on_plane.y, on_plane.off**2 / 2))
        assert seen.paths["path"] == (on_plane,)

    def test_losses_that_are_not_finite_are_passed_over(self) -> None:
        found = plane(torch.eye(2))
        seen = landscape(found, [0.0, 1.0], [0.0], lambda a, b: {"t": math.nan if a == 0 else a}, {})
        assert seen.lowest == (1.0, 0.0, 1.0)
        nothing = landscape(found, [0.0], [0.0], lambda a, b: {"t": math.inf}, {})
        with pytest.raises(InputError, match="no loss on the grid is finite"):
            _ = nothing.lowest

    def test_grids_that_are_none(self) -> None:
        with pytest.raises(InputError, match="finite coordinates"):
            landscape(plane(torch.eye(2)), [], [0.0], lambda a, b: {"t": 0.0}, {})
        with pytest.raises(InputError, match="choose 2 at least"):
            axis([0.0, 1.0], 1)
        assert axis([1.0, 1.0], 3, margin=1.0) == (0.0, 1.0, 2.0)


class TestMoves:
    def test_norms_over_tensors(self) -> None:
        pairs = [(torch.zeros(2, 2), torch.full((2, 2), 2.0)), (torch.full((9,), 2.0), torch.full((9,), 3.0))]
        found = move(pairs)
        assert found.norm == pytest.approx(5.0)
        assert found.base == pytest.approx(6.0)
        assert found.relative == pytest.approx(5 / 6)

    def test_a_base_of_zeros(self) -> None:
        assert Move(1.0, 0.0).relative == math.inf
        assert Move(0.0, 0.0).relative == 0.0

    def test_what_cannot_be_compared(self) -> None:
        with pytest.raises(InputError, match="no tensors"):
            move([])
        with pytest.raises(InputError, match="not all finite"):
            move([(torch.zeros(1), torch.tensor([math.nan]))])

    def test_gain(self) -> None:
        found = Bought({"a": 0.5, "b": 1.0}, {"a": 0.75, "b": 0.5})
        assert found.gain == {"a": 0.25, "b": -0.5}
        assert found.mean == -0.125


class TestGradients:
    def test_of_parameters(self) -> None:
        first = {"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([1.0, 0.0]), "key": torch.tensor([1e-12])}
        second = {"w": torch.tensor([-3.0, -4.0]), "v": torch.tensor([1.0, 1.0]), "key": torch.tensor([1e-12])}
        found = gradient_agreement(first, second)
        assert found.cosines == pytest.approx({"w": -1.0, "v": math.sqrt(0.5)})
        assert found.left_out == ("key",)
        assert found.mean == pytest.approx((math.sqrt(0.5) - 1) / 2)

    def test_gradients_that_cannot_be_compared(self) -> None:
        one = {"w": torch.ones(2)}
        with pytest.raises(InputError, match="same parameters"):
            gradient_agreement(one, {"v": torch.ones(2)})
        with pytest.raises(InputError, match="same parameters"):
            gradient_agreement({}, {})
        with pytest.raises(InputError, match="of w is not finite"):
            gradient_agreement(one, {"w": torch.tensor([1.0, math.nan])})

    def test_anchors_and_states_alike_induce_the_same(self) -> None:
        base, source, call = two_layers()
        x = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1)).half()
        names = [name for name, _ in base.named_parameters()]
        plain = induced_gradients(base, source, call, x.double(), names, "cosine")
        anchored = anchor_gradients(base, call, x.double(), call(source, x.double()), names, "cosine")
        real = states_gradients(base, source, UnitStates(Ragged.whole(x), call), names, "cosine", batch_size=2)
        for name, expected in zip(names, plain, strict=True):
            torch.testing.assert_close(anchored[name], expected)
            torch.testing.assert_close(real[name], expected)

    def test_what_rows_are_filled_up_with_counts_nowhere(self) -> None:
        base, source, call = two_layers()
        x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).half()
        names = [name for name, _ in base.named_parameters()]
        whole = states_gradients(base, source, UnitStates(Ragged.whole(x), call), names, "cosine")
        longer = torch.cat([x, torch.full_like(x, 7.0)], 1)
        real = torch.arange(6)[None, :].expand(2, 6) < 3
        ragged = UnitStates(Ragged.of(longer[real], real), UnitCall(size=6, tokens=6))
        for name, own in states_gradients(base, source, ragged, names, "cosine").items():
            torch.testing.assert_close(own, whole[name])

    def test_no_rows(self) -> None:
        base, source, call = two_layers()
        with pytest.raises(InputError, match="no rows"):
            states_gradients(base, source, UnitStates(Ragged.whole(torch.zeros(0, 3, 6)), call), ["0.weight"], "mse")


class TestLosses:
    def test_of_each_kind(self) -> None:
        logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
        assert loss_of("labels", logits, torch.tensor([1, 0])).tolist() == pytest.approx([-math.log(0.75), math.log(2)])
        flags = loss_of("flags", logits, torch.tensor([[0, 1], [1, 1]]))
        assert flags.tolist() == pytest.approx([(math.log(2) - math.log(0.75)) / 2, math.log(2)])
        assert loss_of("values", torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 1.0])).tolist() == [1.0, 4.0]
        same = Target(logits.log_softmax(-1))
        assert loss_of("labels", logits, same).abs().max() < 1e-6


def test_float32_input_is_computed_in_float64() -> None:
    model = fine_tune(make_model("bert"), seed=1)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    assert spectrum(weight).values == pytest.approx(torch.linalg.svdvals(weight.detach().double()).tolist())
