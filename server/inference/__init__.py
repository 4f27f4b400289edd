"""From what a request asks for to answers of the engine."""
