"""Masks: which entries of a weight are trained.

Each mask is a function `(weight, density, *, k=None, grad=None, seed=0, skip=0, granularity=1) -> indices`:

- weight: any shape, floating point. The mask holds `k` entries, or max(1, round(density * numel)) if `k` is None.
- grad: the weight's gradient, for masks that rank by it.
- seed: any integer, for masks that draw; taken modulo 2^64.
- skip: leave out the first `skip` entries of the ranking and take those that follow, so that masks of one ranking
  with skips of 0, k, 2k, ... share no entry.
- granularity: rank aligned runs of that many flat entries instead of single ones. `k` and `skip` are rounded to whole
  runs (`k` to at least one); a shorter run at the end counts as a run, and a mask that holds it has fewer entries. A
  run's score is the sum of its entries' scores. Of equal scores the lower position goes first.
- indices: flat row-major positions, sorted and unique, on the weight's device; int32 for weights below 2^31 elements,
  else int64.

All raise ValueError naming the argument, and refuse NaN scores. A user's own function has the same arguments and
result.
"""

from shira.masks.functions import MASKS as MASKS
from shira.masks.functions import Mask as Mask
from shira.masks.functions import grad as grad
from shira.masks.functions import rand as rand
from shira.masks.functions import small as small
from shira.masks.functions import snip as snip
from shira.masks.functions import struct as struct
from shira.masks.functions import wm as wm
