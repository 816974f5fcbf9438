"""What several test modules share: builders of whales, fakes, and rigs that run parts of whaled or all of it."""
