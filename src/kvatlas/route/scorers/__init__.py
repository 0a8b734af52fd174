"""llm-d's scorers, and the filters and the producer that go with them, under llm-d's names: see ``docs/scorers.md``."""
