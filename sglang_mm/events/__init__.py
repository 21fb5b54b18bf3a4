"""What ranks tell while they work: messages, the hub they pass through, progress; and who is the cause of a fault."""

from sglang_mm.events.hub import EventHub
from sglang_mm.events.messages import Verdict
from sglang_mm.events.naming import named
from sglang_mm.events.progress import Progress
from sglang_mm.events.publishing import Publisher, publisher
from sglang_mm.events.reading import Reading
from sglang_mm.events.subscribing import Subscriber, subscribe
from sglang_mm.events.vitals import Vitals
from sglang_mm.events.wire import CONTROL_ENV, ENV

__all__ = [
    "CONTROL_ENV",
    "ENV",
    "EventHub",
    "Progress",
    "Publisher",
    "Reading",
    "Subscriber",
    "Verdict",
    "Vitals",
    "named",
    "publisher",
    "subscribe",
]
