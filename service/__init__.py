"""What a request reaches: chat, votes, the operator's API, the pages. Imports neither torch nor vllm."""
