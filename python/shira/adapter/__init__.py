"""An adapter as data: its tensors, its file, and arithmetic with them."""

from shira.adapter.adapter import DTYPES as DTYPES
from shira.adapter.adapter import Adapter as Adapter
from shira.adapter.adapter import AdapterTensor as AdapterTensor
from shira.adapter.adapter import checksum_of as checksum_of
