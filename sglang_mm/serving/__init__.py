"""SGLang's side: the only room that imports sglang, and only inside processes that our launcher started."""
