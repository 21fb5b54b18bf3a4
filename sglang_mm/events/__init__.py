"""What ranks tell while they work: messages, the hub they pass through, the progress of one prefill."""

from sglang_mm.events.hub import EventHub
from sglang_mm.events.progress import Progress
from sglang_mm.events.publishing import Publisher, publisher
from sglang_mm.events.subscribing import Subscriber, subscribe
from sglang_mm.events.wire import ENV

__all__ = ["ENV", "EventHub", "Progress", "Publisher", "Subscriber", "publisher", "subscribe"]
