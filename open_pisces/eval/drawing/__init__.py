"""Drawing from prompts: GenEval's prompts, rules and detectors, exports for other tools, galleries."""
