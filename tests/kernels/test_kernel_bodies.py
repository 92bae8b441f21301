"""The kernels' own code, run thread by thread over ordinary memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_machine import install

from asyncdp import _kernels as kernels
from asyncdp._kernels import bodies, cuda, plan, reference

CPU = torch.device("cpu")
DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8"),
]


@pytest.fixture
def machine(monkeypatch):
    """Yield a CPU in place of the GPU, with outputs full of NaN until the kernel writes them."""
    torch.use_deterministic_algorithms(True)
    yield install(monkeypatch)
    torch.use_deterministic_algorithms(False)


def numbers(shape, dtype, seed=0):
    """Make numbers whose sums round, or wrap, in most places."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    shape, limits = (shape,) if isinstance(shape, int) else shape, torch.iinfo(dtype)
    return torch.randint(limits.min // 2, limits.max // 2 + 1, shape, dtype=dtype, generator=generator)


def shifted(tensor, offset):
    """Move a tensor `offset` elements away from an aligned address."""
    room = torch.empty(tensor.numel() + offset + 16, dtype=tensor.dtype)
    start = -room.data_ptr() % 16 // tensor.itemsize + offset
    return room[start : start + tensor.numel()].copy_(tensor.flatten()).view(tensor.shape)


def same_bits(left, right):
    """Compare tensors by their bytes, so that NaN and signed zeros count."""
    left_bytes, right_bytes = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    return left.stride() == right.stride() and torch.equal(left_bytes, right_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("numel", "offset"), [(1, 0), (37, 1), (4003, 0), (4099, 0), (4500, 3)])
def test_sums_equal_the_reference_bit_for_bit(machine, dtype, numel, offset):
    """Any dtype, size and shared odd offset: the compiled kernel's code gives the reference's bits."""
    kind = getattr(torch, dtype)
    tensors = [shifted(numbers(numel, kind, seed), offset) for seed in range(3)]
    (total,) = cuda.reduce_add_many([tensors], CPU)
    assert same_bits(total, reference.reduce_add(tensors, CPU))


@pytest.mark.parametrize("num_inputs", [1, 2, 5, 9])
def test_any_number_of_inputs_is_summed(machine, num_inputs):
    """From one input up, each is read and none twice."""
    tensors = [numbers(300, torch.float32, seed) for seed in range(num_inputs)]
    (total,) = cuda.reduce_add_many([tensors], CPU)
    assert same_bits(total, reference.reduce_add(tensors, CPU))
    assert total.data_ptr() not in [tensor.data_ptr() for tensor in tensors]


def test_inputs_out_of_step_fall_back_to_single_elements(machine):
    """Where no 16-byte boundary is common to all tensors, the sum is still right, without wide loads."""
    tensors = [shifted(numbers(2000, torch.float32, i), i) for i in range(3)]
    machine.num_wide = 0
    (total,) = cuda.reduce_add_many([tensors], CPU)
    assert same_bits(total, reference.reduce_add(tensors, CPU))
    assert machine.num_wide == 0


@pytest.mark.parametrize(("offset", "num_vectors"), [(0, 1000), (1, 999), (3, 999)])
def test_sums_in_step_use_vectors_for_all_but_the_ends(machine, offset, num_vectors):
    """Where all addresses reach a boundary together, only the elements before it and at the end go alone."""
    tensors = [shifted(numbers(4000, torch.float32, i), offset) for i in range(2)]
    total = shifted(torch.zeros(4000), offset)
    table = plan.sum_table([4000], [[tensor.data_ptr() for tensor in (total, *tensors)]], 4)
    cuda._run("reduce_add_float32", CPU, table, 2)
    assert machine.num_wide == 3 * num_vectors
    assert torch.equal(total, tensors[0] + tensors[1])


def test_a_bucket_of_unlike_tensors_is_one_launch(machine, monkeypatch):
    """Tensors of unlike sizes, empty ones too, are summed by one launch, each into its own result."""
    sizes = [1, 0, 5000, 17, 0, 1024, 3]
    groups = [[numbers(size, torch.float32, seed + size) for seed in range(4)] for size in sizes]
    launches = []
    run = cuda._run
    monkeypatch.setattr(cuda, "_run", lambda *arguments: (launches.append(arguments[0]), run(*arguments)))
    totals = cuda.reduce_add_many(groups, CPU)
    assert launches == ["reduce_add_float32"]
    assert all(
        same_bits(total, reference.reduce_add(group, CPU))
        for total, group in zip(totals, groups, strict=True)
    )
    assert [total.numel() for total in totals] == sizes


def test_dtypes_and_lane_counts_may_be_mixed_in_a_bucket(machine):
    """Groups keep their order whatever launch each of them needs."""
    groups = [
        [numbers(40, torch.float32, i) for i in range(2)],
        [numbers(40, torch.int8, i) for i in range(2)],
        [numbers(40, torch.float32, i) for i in range(3)],
        [torch.eye(3).to_sparse() for i in range(2)],
    ]
    totals = cuda.reduce_add_many(groups, CPU)
    assert [total.dtype for total in totals] == [group[0].dtype for group in groups]
    assert torch.equal(totals[2], reference.reduce_add(groups[2], CPU))
    assert totals[3].layout is torch.sparse_coo


def test_dense_layouts_go_straight_through(machine, monkeypatch):
    """Inputs in channels_last are read in place; one in another layout is copied first."""
    inputs = [numbers((2, 3, 4, 5), torch.float32, i).to(memory_format=torch.channels_last) for i in range(2)]
    inputs.append(numbers((2, 3, 4, 5), torch.float32, 2))
    copied = []
    in_layout_of = cuda._in_layout_of

    def watch(total, sources):
        result = in_layout_of(total, sources)
        copied.extend(new is not old for new, old in zip(result, sources, strict=True))
        return result

    monkeypatch.setattr(cuda, "_in_layout_of", watch)
    (total,) = cuda.reduce_add_many([inputs], CPU)
    assert copied == [False, False, True]
    assert total.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(total, reference.reduce_add(inputs, CPU))


def test_lazy_conjugation_and_negation_are_seen(machine):
    """A lazily conjugated or negated tensor is summed by its value, not by the memory under it."""
    value = numbers(8, torch.complex64)
    (total,) = cuda.reduce_add_many([[value.conj(), value]], CPU)
    assert torch.equal(total, torch.complex(2 * value.real, torch.zeros(8)))
    negated = value.conj().imag
    (total,) = cuda.reduce_add_many([[negated, value.imag.contiguous()]], CPU)
    assert torch.equal(total, torch.zeros(8))


GATHERS = [
    ((3, 4, 5), 0, [2, 1, 4]),
    ((3, 4, 5), 1, [1, 3]),
    ((3, 4, 5), -1, [5, 7, 1]),
    ((6, 700), -1, [700, 8, 1300]),
    ((2, 1), 1, [1, 1, 1]),
    ((1100, 1), 1, [1, 1]),
    ((5000,), 0, [5000, 0, 33, 2]),
    ((0, 4), 0, [0, 3]),
    ((0, 4), 0, [0, 0]),
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.complex128])
@pytest.mark.parametrize(("shape", "dim", "lengths"), GATHERS)
def test_gather_equals_concatenation(machine, dtype, shape, dim, lengths):
    """Any dim, dtype and odd size: shards are concatenated, to the last byte as torch does it."""
    shards = []
    for seed, length in enumerate(lengths):
        shard_shape = list(shape)
        shard_shape[dim] = length
        shards.append(numbers(shard_shape, dtype, seed))
    assert same_bits(cuda.gather(shards, dim, CPU), torch.cat(shards, dim))


def test_gather_keeps_channels_last(machine):
    """Shards that are all in channels_last are gathered in it, along any dimension."""
    shards = [numbers((2, 3, 4, 4), torch.float32, i).to(memory_format=torch.channels_last) for i in range(2)]
    for dim in range(-4, 4):
        whole = cuda.gather(shards, dim, CPU)
        assert whole.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(whole, torch.cat(shards, dim))


def test_gather_takes_any_strides(machine):
    """Transposed, stepped and lazily conjugated shards are gathered by their values."""
    value = numbers((6, 5), torch.complex64)
    shards = [value.conj(), value.t()[:, :5].t()[:5], value[::2]]
    assert torch.equal(cuda.gather(shards, 0, CPU), torch.cat([shard.clone() for shard in shards]))


@pytest.mark.parametrize(
    ("shards", "dim", "error"),
    [
        ([torch.ones(2, 3), torch.ones(2, 4)], 0, RuntimeError),
        ([torch.ones(2, 3)], 2, IndexError),
        ([torch.ones(2), torch.ones(2, dtype=torch.int32)], 0, None),
    ],
)
def test_gather_leaves_the_rest_to_torch(shards, dim, error):
    """Shards of unlike sizes or dtypes never reach the kernel: torch raises its error, or converts them."""
    assert not cuda.has_copy_kernel(shards, dim)
    if error is None:
        assert torch.equal(kernels.gather(shards, dim, CPU), torch.cat(shards, dim))
    else:
        with pytest.raises(error):
            kernels.gather(shards, dim, CPU)


def test_multiplication_by_a_reciprocal_is_exact_division():
    """For every divisor and index of a tile of bytes the product's high bits are the quotient."""
    index = np.arange(bodies.COPY_TILE_BYTES, dtype=np.uint64)
    for divisor in range(1, bodies.COPY_TILE_BYTES + 1):
        reciprocal = plan.reciprocal(divisor)
        assert reciprocal < 1 << 32
        quotient = (index * np.uint64(reciprocal)) >> np.uint64(bodies.RECIPROCAL_BITS)
        assert np.array_equal(quotient, index // np.uint64(divisor))


@pytest.mark.parametrize("unit", [1, 4, 16])
def test_tiles_cover_rows_and_are_well_used(unit):
    """The parts of a row are its columns, none is empty, and tiles move three quarters of what they could."""
    tile_units = bodies.COPY_TILE_BYTES // unit
    for columns in [*range(1, 3000, 7), 4096, 4097, 262143]:
        column_tiles, tile_columns, tile_rows = plan._tile_shape(columns, tile_units)
        assert (column_tiles - 1) * tile_columns < columns <= column_tiles * tile_columns
        assert 1 <= tile_columns * tile_rows <= tile_units
        assert columns / column_tiles * tile_rows > 0.75 * tile_units


@pytest.mark.parametrize(("bits", "signs"), [(8, 0x80808080), (16, 0x80008000)])
def test_packed_addition_wraps_each_number_alone(bits, signs):
    """Small integers added several to a word never carry into their neighbour."""
    rng = np.random.default_rng(0)
    kind = np.dtype(f"uint{bits}")
    for _ in range(200):
        a, b = (rng.integers(0, 1 << bits, 32 // bits, dtype=kind) for _ in range(2))
        word = bodies.add_packed(int(a.view(np.uint32)[0]), int(b.view(np.uint32)[0]), signs)
        assert np.array_equal(np.array([word], np.uint32).view(kind), a + b)


def test_blocks_are_balanced_whatever_the_sizes():
    """No block of a bucket has more than one tile, and every tile belongs to the row that is searched."""
    sizes = [1, 1 << 20, 7, 4096, 1 << 16]
    table = plan.sum_table(sizes, [[1 << 12, 1 << 20, 1 << 24]] * len(sizes), 4)
    elements = table.rows[:, bodies.NUM_VECTORS] * 4 + table.rows[:, bodies.NUM_SCALARS]
    assert list(elements) == sizes
    assert table.num_tiles == 1 + 256 + 2 + 1 + 16
