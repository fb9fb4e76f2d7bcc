"""An adapter as data: its tensors, its file, and arithmetic with them."""

from shira.adapter.adapter import Adapter as Adapter
from shira.adapter.checksum import checksum_of as checksum_of
from shira.adapter.tensor import DTYPES as DTYPES
from shira.adapter.tensor import AdapterTensor as AdapterTensor
