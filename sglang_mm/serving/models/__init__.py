"""SGLang's models, made context parallel. Each module has an EntryClass that SGLang's registry finds by name."""
