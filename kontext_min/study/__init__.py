"""See inside the model: record, replace and ablate what flows through its named modules. docs/study.md shows how."""
