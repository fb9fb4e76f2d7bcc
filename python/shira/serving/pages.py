"""Unfused adapters on the model's devices: sparse deltas in pages of one size, shared by all adapters and weights.

Each resident mix (most often one adapter at strength 1) has a slot. In every weight's table the slot's row says where
the mix's entries are:

- `row_ptr` [slots, out + 1] int32: the entries of output row r are those from row_ptr[slot, r] to row_ptr[slot, r + 1];
- `page_table` [slots, most pages of one] int32: entry e is in page page_table[slot, e // PAGE], at e % PAGE.

`add_sparse_delta_mm_batched` reads both, so a mix comes and goes without others being moved.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from shira.model.interrupts import interrupts_held
from shira.serving.arena import Arena, Mix

# Entries of a page. On average half a page of each adapter and weight stays empty: of a weight of 1024 x 1024 at 1 %
# 17 %, of 4096 x 4096 1 %. Each page costs the CPU kernels about 0.4 us and a start of the processor's prefetching:
# a decode step of 8 adapters took 12 ms beside the base's 55 with pages of 1024 entries, 9 with 4096, 8 with 16384.
PAGE = 4096

Counts = Mapping[torch.Tensor, int]  # entries of each weight
Deltas = list[tuple[Arena, torch.Tensor]]  # entries with an index for each, and values in the weights' dtype
PoolKey = tuple[torch.dtype, torch.device, torch.dtype]  # of values; where; of columns


@dataclass(eq=False)
class Pool:
    """Pages of the weights of one dtype and device: of the narrow ones (uint16 columns), or of the wide ones."""

    col: torch.Tensor  # [pages, PAGE]
    values: torch.Tensor  # [pages, PAGE]
    free: list[int]


@dataclass(eq=False)
class Table:
    """Where the entries of one weight are, for each slot."""

    pool: Pool
    row_ptr: torch.Tensor
    page_table: torch.Tensor


@dataclass(frozen=True, eq=False)
class Slot:
    """The pages and the row of the tables that a resident mix takes."""

    number: int
    pages: dict[PoolKey, list[int]]
    counts: Counts


class Immovable(Exception):
    """Tables and pools that must stay where they are have no room for a batch."""


class Pages:
    """The pools, the tables, and the mixes that are in them.

    The keys of `residents` are sorted by name, and come in the order of their last use: `touch` keeps it. Others read
    `residents` and the counters, and change neither.

    With a budget (bytes) pools and tables take no more than it, all of it from the first time that something is brought
    in, and the least recently used makes room. They are laid out again, empty, when an adapter changes a further
    weight, has far more entries in one than any before, or when a batch needs other shares for slots and pages.
    Without a budget they grow by need, and everything stays.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.tables: dict[torch.Tensor, Table] = {}
        self.residents: OrderedDict[Mix, Slot] = OrderedDict()  # the least recently used first
        self.pools: dict[PoolKey, Pool] = {}
        self.hits = self.misses = self.evictions = 0  # mixes found here, brought in, and dropped to make room
        self._free_slots: list[int] = []
        self._transposed: dict[torch.Tensor, bool] = {}
        self._widest: dict[torch.Tensor, int] = {}  # pages that an adapter needs for a weight at most
        self._registered: dict[str, Counts] = {}
        self._users: Counter[torch.Tensor] = Counter()  # how many registered adapters change each weight
        self._unused: set[torch.Tensor] = set()  # weights of `weights` that none changes any more

    @property
    def nbytes(self) -> int:
        """Bytes of the pools and tables."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors of the pools and tables."""
        for pool in self.pools.values():
            yield from (pool.col, pool.values)
        for table in self.tables.values():
            yield from (table.row_ptr, table.page_table)

    @property
    def count(self) -> int:
        """How many pages there are."""
        return sum(pool.col.shape[0] for pool in self.pools.values())

    @property
    def used(self) -> int:
        """How many pages hold something."""
        return sum(len(pages) for slot in self.residents.values() for pages in slot.pages.values())

    @property
    def weights(self) -> Collection[torch.Tensor]:
        """The weights that registered adapters change, and before `trim` those that forgotten ones did."""
        return self._widest.keys()

    def register(self, name: str, counts: Counts, transposed: Mapping[torch.Tensor, bool]) -> None:
        """Notes an adapter that may be brought in. transposed: of each weight, whether it is [in, out]."""
        self._transposed.update(transposed)
        self._widest.update(self._widths(counts))
        self._users.update(counts.keys())
        self._unused.difference_update(counts)
        self._registered[name] = counts

    def forget(self, name: str) -> None:
        """Drops a registered adapter, and the mixes that name it."""
        counts = self._registered.pop(name)
        self._users.subtract(counts.keys())
        self._unused.update(weight for weight in counts if not self._users[weight])
        for mix in [mix for mix in self.residents if any(part == name for part, _ in mix)]:
            self._drop(mix)

    def trim(self) -> list[torch.Tensor]:
        """Drops the tables and pools that no registered adapter needs. Gives the weights of the tables."""
        if not self._unused:
            return []
        weights = list(self._unused)
        for weight in weights:
            self._widest.pop(weight, None)
            self.tables.pop(weight, None)
            self._users.pop(weight, None)
            self._transposed.pop(weight, None)  # last, for what is in the others needs it
        keys = {self._key(weight) for weight in self._widest}
        self.pools = {key: pool for key, pool in self.pools.items() if key in keys}
        self._unused.clear()
        return weights

    def repair(self, names: Collection[str]) -> None:
        """After a change that was cut off: keeps what is of the adapters of these names, and finds what is free."""
        self._registered = {name: counts for name, counts in self._registered.items() if name in names}
        for mix in [mix for mix in self.residents if any(name not in self._registered for name, _ in mix)]:
            del self.residents[mix]
        self._users = Counter(weight for counts in self._registered.values() for weight in counts)
        self._unused = {*self._transposed, *self._widest, *self.tables}.difference(self._users)
        slots = max((table.row_ptr.shape[0] for table in self.tables.values()), default=0)
        self._free_slots = sorted(set(range(slots)).difference(slot.number for slot in self.residents.values()))
        for key, pool in self.pools.items():
            taken = itertools.chain.from_iterable(slot.pages.get(key, ()) for slot in self.residents.values())
            pool.free = sorted(set(range(pool.col.shape[0])).difference(taken))

    def touch(self, mix: Mix) -> bool:
        """Notes that a batch uses the mix now, which makes it the most recently used one. Gives whether it is resident;
        nothing is noted of one that is not."""
        if mix not in self.residents:
            return False
        self.residents.move_to_end(mix)
        self.hits += 1
        return True

    def make_room(self, needed: Mapping[Mix, Counts], *, stay: bool) -> None:
        """Makes room for all of these together. Those of them that are resident stay so, unless all is laid out again.

        Raises ValueError if they need more than the budget, and Immovable if tables and pools must `stay` where they
        are and have no room. Nothing was changed then.
        """
        most: Counter[torch.Tensor] = Counter()
        for counts in needed.values():
            most |= Counter(counts)
        widths = {**self._widest, **self._widths(most)}
        pages = self._pages(needed.values())
        if self.budget is not None:
            need = len(needed) * self._slot_bytes(widths) + _bytes_of(pages)
            if need > self.budget:
                raise ValueError(f"device_budget is {self.budget} bytes; the {len(needed)} of this batch need {need}")
        if stay and not self._fits(needed, {weight: widths[weight] for weight in most}, pages):
            raise Immovable
        self._widest = widths
        if not stay and not self._fits(needed, widths, pages):
            if self.budget is None:
                self._grow(needed)
            else:
                self._lay_out(len(needed), pages, self.budget)
        missing = {mix: counts for mix, counts in needed.items() if mix not in self.residents}
        lacking = self._pages(missing.values())
        for mix in list(self.residents):
            if len(self._free_slots) >= len(missing) and self._have_free(lacking):
                break
            if mix not in needed:
                self._drop(mix)
                self.evictions += 1

    def bring_in(self, mix: Mix, counts: Counts, deltas: Deltas) -> None:
        """Gives the mix a slot and copies its entries, for which there is room, into pages."""
        number = self._free_slots[-1]
        taken = {key: self.pools[key].free[-count:] for key, count in self._pages([counts]).items()}
        for weight, table in self.tables.items():
            if not counts.get(weight):
                table.row_ptr[number].zero_()
        for key, pages in taken.items():
            self._fill(number, key, pages, deltas)
        with interrupts_held():
            self._free_slots.pop()
            for key, pages in taken.items():
                del self.pools[key].free[-len(pages) :]
            self.residents[mix] = Slot(number, taken, counts)
            self.misses += 1

    def _fill(self, number: int, key: PoolKey, pages: list[int], deltas: Deltas) -> None:
        pool = self.pools[key]
        # Empty places at a page's end are never read; zeros keep the padding harmless for any kernel.
        col, values = (entries.new_zeros(len(pages), PAGE) for entries in (pool.col, pool.values))
        places = sent(pages, torch.int64, key[1])
        begin = 0
        for entries, all_values in deltas:
            for weight, part in entries.parts:
                count = part.stop - part.start
                if not count or self._key(weight) != key:
                    continue
                table, end = self.tables[weight], begin + _pages_for(count)
                row_ptr, columns, own = _csr(weight, entries.indices[part], all_values[part], self._transposed[weight])
                table.row_ptr[number] = row_ptr
                table.page_table[number, : end - begin] = places[begin:end]
                col.view(-1)[begin * PAGE : begin * PAGE + count] = columns
                values.view(-1)[begin * PAGE : begin * PAGE + count] = own
                begin = end
        signed = torch.int16 if pool.col.dtype == torch.uint16 else torch.int32  # index_copy_ knows no uint16
        pool.col.view(signed).index_copy_(0, places, col.view(signed))
        pool.values.index_copy_(0, places, values)

    def _drop(self, mix: Mix) -> None:
        with interrupts_held():
            slot = self.residents.pop(mix)
            self._free_slots.append(slot.number)
            for key, pages in slot.pages.items():
                self.pools[key].free += pages

    def _key(self, weight: torch.Tensor) -> PoolKey:
        narrow = self._shape(weight)[1] <= 2**16
        return weight.dtype, weight.device, torch.uint16 if narrow else torch.int32

    def _shape(self, weight: torch.Tensor) -> tuple[int, int]:
        """Gives (out, in) of a weight."""
        rows, width = weight.shape
        return (width, rows) if self._transposed[weight] else (rows, width)

    def _widths(self, counts: Counts) -> dict[torch.Tensor, int]:
        """Gives how many columns page tables need: powers of two, so that they seldom grow."""
        widths = {weight: max(2, 1 << (_pages_for(count) - 1).bit_length()) for weight, count in counts.items()}
        return {weight: max(width, self._widest.get(weight, 0)) for weight, width in widths.items()}

    def _pages(self, all_counts: Iterable[Counts]) -> Counter[PoolKey]:
        pages: Counter[PoolKey] = Counter()
        for counts in all_counts:
            for weight, count in counts.items():
                if count:
                    pages[self._key(weight)] += _pages_for(count)
        return pages

    def _slot_bytes(self, widths: Mapping[torch.Tensor, int]) -> int:
        return sum(4 * (self._shape(weight)[0] + 1 + width) for weight, width in widths.items())

    def _fits(
        self, needed: Mapping[Mix, Counts], widths: Mapping[torch.Tensor, int], pages: Mapping[PoolKey, int]
    ) -> bool:
        """Whether the tables and pools that are there have room for all of these."""
        if self.budget is not None:
            return self._has_tables(widths) and self._could_hold(len(needed), pages)
        missing = [counts for mix, counts in needed.items() if mix not in self.residents]
        room = len(self._free_slots) >= len(missing) and self._have_free(self._pages(missing))
        return room and self._has_tables(widths)

    def _has_tables(self, widths: Mapping[torch.Tensor, int]) -> bool:
        return all(
            weight in self.tables and self.tables[weight].page_table.shape[1] >= width
            for weight, width in widths.items()
        )

    def _have_free(self, pages: Mapping[PoolKey, int]) -> bool:
        return all(key in self.pools and len(self.pools[key].free) >= count for key, count in pages.items())

    def _could_hold(self, slots: int, pages: Mapping[PoolKey, int]) -> bool:
        """Whether there would be room if all others were evicted."""
        return slots <= len(self._free_slots) + len(self.residents) and all(
            key in self.pools and self.pools[key].col.shape[0] >= count for key, count in pages.items()
        )

    def _lay_out(self, slots: int, pages: Counter[PoolKey], budget: int) -> None:
        """Lays out all of the budget anew: as many slots as registered adapters of average size fill, and pages for the
        rest."""
        slot_bytes = self._slot_bytes(self._widest)
        keys = {self._key(weight) for weight in self._widest}
        registered = self._pages(self._registered.values())
        usual = {key: registered[key] * _page_bytes(key) / max(1, len(self._registered)) for key in keys}
        most = (budget - _bytes_of(pages)) // max(1, slot_bytes)
        slots = max(slots, 1, min(most, int(budget // max(1, slot_bytes + sum(usual.values())))))
        rest = budget - slots * slot_bytes - _bytes_of(pages)
        share = {key: usual[key] / (sum(usual.values()) or 1) for key in keys}
        sizes = {key: pages[key] + max(0, int(rest * share[key])) // _page_bytes(key) for key in keys}
        self.evictions += len(self.residents)
        with interrupts_held():
            self.residents.clear()  # first: without tables nothing is resident
            self._set({}, {}, [])
        self._resize(slots, sizes)

    def _grow(self, needed: Mapping[Mix, Counts]) -> None:
        """Makes room beside what is there, which keeps its slots and pages. Sizes double, so this is seldom needed."""
        missing = [counts for mix, counts in needed.items() if mix not in self.residents]
        lacking = self._pages(missing)
        slots = _grown(len(self._free_slots) + len(self.residents), len(self.residents) + len(missing))
        sizes = {}
        for key in {self._key(weight) for weight in self._widest}:
            pool = self.pools.get(key)
            there, free = (0, 0) if pool is None else (pool.col.shape[0], len(pool.free))
            sizes[key] = _grown(there, there - free + lacking[key])
        self._resize(slots, sizes)

    def _resize(self, slots: int, sizes: Mapping[PoolKey, int]) -> None:
        """Makes new pools and tables, with what is in the old ones."""
        with torch.inference_mode(False):  # else nothing outside inference mode could write them
            pools = {}
            for key, size in sizes.items():
                dtype, device, col_dtype = key
                pool = Pool(
                    torch.empty(size, PAGE, dtype=col_dtype, device=device),
                    torch.empty(size, PAGE, dtype=dtype, device=device),
                    [],
                )
                if (old := self.pools.get(key)) is not None:
                    pool.col[: old.col.shape[0]] = old.col
                    pool.values[: old.values.shape[0]] = old.values
                    pool.free += old.free
                pool.free += range(old.col.shape[0] if old is not None else 0, size)
                pools[key] = pool
            tables = {}
            for weight, width in self._widest.items():
                rows = self._shape(weight)[0] + 1
                row_ptr, page_table = (
                    torch.zeros(slots, columns, dtype=torch.int32, device=weight.device) for columns in (rows, width)
                )
                if (before := self.tables.get(weight)) is not None:
                    row_ptr[: before.row_ptr.shape[0]] = before.row_ptr
                    page_table[: before.page_table.shape[0], : before.page_table.shape[1]] = before.page_table
                tables[weight] = Table(pools[self._key(weight)], row_ptr, page_table)
        taken = {slot.number for slot in self.residents.values()}
        with interrupts_held():
            self._set(pools, tables, [number for number in range(slots) if number not in taken])

    def _set(self, pools: dict[PoolKey, Pool], tables: dict[torch.Tensor, Table], free_slots: list[int]) -> None:
        self.pools, self.tables, self._free_slots = pools, tables, free_slots


def sent(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Gives a tensor of the numbers on a device, without a wait for a GPU."""
    tensor = torch.tensor(numbers, dtype=dtype, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _pages_for(count: int) -> int:
    return -(-count // PAGE)


def _page_bytes(key: PoolKey) -> int:
    return PAGE * (key[0].itemsize + key[2].itemsize)


def _bytes_of(pages: Mapping[PoolKey, int]) -> int:
    return sum(count * _page_bytes(key) for key, count in pages.items())


def _grown(size: int, need: int) -> int:
    """Gives a size that holds `need`: at least 2, since compiled code treats sizes of 0 and 1 as special."""
    return max(2, size) if need <= size else max(2, need, 2 * size)


def _csr(
    weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives sorted entries of a weight (of a transposed one its transpose's) as row_ptr [out + 1], and columns and
    values [nnz]."""
    rows, width = weight.shape
    if transposed:
        rows, width = width, rows
        indices, order = (indices % rows * width + indices // rows).sort()
        values = values[order]
    starts = torch.arange(0, rows * width + 1, max(1, width), dtype=indices.dtype, device=indices.device)
    return torch.searchsorted(indices, starts, out_int32=True), indices % width, values
