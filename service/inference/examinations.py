"""What inference processes found of pairs that were never trained, kept: a model never changes."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, final

from service.contract.wire import ExamineCall

if TYPE_CHECKING:
    from service.contract.diagnostics import PairDiagnostics
    from service.contract.wire import ModelRef
    from service.inference.gateway import Gateway

MAX_KEPT: Final = 4096


@final
class Examinations:
    """Asks for what is not known; by the digest of a model, so equal models of two tenants are one."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._known: OrderedDict[tuple[str, str, str], dict[str, PairDiagnostics]] = OrderedDict()

    def knows(self, model: ModelRef, from_: str, to: str) -> bool:
        """Tell whether nobody needs to be asked."""
        return (model.digest, from_, to) in self._known

    async def of(self, gateway: Gateway, model: ModelRef, from_: str, to: str) -> dict[str, PairDiagnostics]:
        """Return what the banks tell, by the modality of the bridge.

        Raises what `Gateway.examine` raises.
        """
        key = (model.digest, from_, to)
        if (known := self._known.get(key)) is None:
            call = ExamineCall.model_validate({"model": model, "from": from_, "to": to})
            known = (await gateway.examine(call)).through
            self._known[key] = known
            while len(self._known) > self._max_kept:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return known
