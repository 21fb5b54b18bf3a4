"""What ranks tell while they work: messages, the hub they pass through, progress."""

from sglang_mm.events.hub import EventHub
from sglang_mm.events.progress import Progress
from sglang_mm.events.publishing import Publisher, publisher
from sglang_mm.events.reading import Reading
from sglang_mm.events.subscribing import Subscriber, subscribe
from sglang_mm.events.wire import ENV

__all__ = ["ENV", "EventHub", "Progress", "Publisher", "Reading", "Subscriber", "publisher", "subscribe"]
