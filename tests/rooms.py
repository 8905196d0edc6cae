"""The rooms of the package, and the directions of their imports: docs/architecture.md states the same table."""

# The rooms that each room may import from, besides itself. The core is the root without `pipeline` and `registration`.
ROOMS = {
    "core": set(),
    "pipeline": {"core"},
    "registration": {"core", "pipeline"},
    "data": {"core"},
    "evaluation": {"core"},
    "codec": {"core", "data", "evaluation", "pipeline", "registration"},
    "training": {"core", "data", "evaluation"},
    "sharing": {"core", "data", "evaluation", "training"},
    "conversion": {"core", "pipeline"},
    "commands": {
        "core",
        "pipeline",
        "registration",
        "data",
        "evaluation",
        "training",
        "sharing",
        "conversion",
        "codec",
    },
}
