"""Which worker computes the prompt that several choices share, so that one prefill serves them all.

A worker computes a prompt once while equal ones are in flight there. The first choice that starts
names the place; the others find it here, count their prompt as cached there and take it if that is
still the cheapest. A place that is full, gone or excluded needs no word here: it is no candidate,
and the next choice that starts names a new one. An entry lives as long as its choices.
"""

from dataclasses import dataclass

from protocol.errors import LocalError
from router.scheduling.fleet import Reservation


@dataclass(slots=True)
class Place:
    """Where the siblings' prompt is, or is being computed."""

    num_choices: int = 0
    """Living siblings."""
    reservation: Reservation | None = None
    """The prefill that computes this prompt; None before the first start."""


class Siblings:
    """Places by the name that the choices of a prompt share."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def join(self, name: str) -> None:
        """A choice begins. The empty name is nobody's."""
        if name:
            self._places.setdefault(name, Place()).num_choices += 1

    def leave(self, name: str) -> None:
        """A choice has ended; with the last one the place is forgotten."""
        if name:
            place = self._places[name]
            place.num_choices -= 1
            if not place.num_choices:
                del self._places[name]

    def started(self, name: str, reservation: Reservation) -> None:
        """A choice's prompt is computed under this reservation from now on: the last place that
        was chosen counts, and in it the one that computes."""
        if not name:
            return
        known = self.place_of(name)
        if known is None or known.worker is not reservation.worker:
            self._places[name].reservation = reservation

    def place_of(self, name: str) -> Reservation | None:
        """The prefill to join: one that is computed (nothing is left to compute) or still charged.
        One that ended otherwise has left nothing behind."""
        if not name:
            return None
        reservation = self._places[name].reservation
        if reservation is None or reservation.worker.dead:
            return None
        charged = reservation.worker.reservations.get(reservation.attempt) is reservation
        return reservation if charged or not reservation.tokens else None

    def validate(self, names: list[str]) -> None:
        """Raises LocalError unless exactly these, one for each living choice, are counted."""
        counts = {name: names.count(name) for name in set(names) if name}
        if counts != {name: place.num_choices for name, place in self._places.items()}:
            raise LocalError("siblings do not add up")
