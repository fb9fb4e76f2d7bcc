"""Adapters from and to the formats of other tools; `docs/convert.md` describes them.

    shira              this package's own files
    peft-shira         a folder of PEFT with a SHiRA adapter
    peft-supertuning   a folder of PEFT with a Super-Tuning adapter; read only
    peft-merged        a folder of PEFT with any other adapter that can be merged, such as LoRA and DoRA; read only
    patch              a sparse weight patch as vLLM and TRL have them: `<name>.indices` and `<name>.values`

No format is read by unpickling, so `adapter_model.bin` is refused. PEFT and transformers are imported for peft-merged
alone.
"""

from shira.convert.formats import WRITTEN as WRITTEN
from shira.convert.formats import format_of as format_of
from shira.convert.formats import read as read
from shira.convert.formats import write as write
