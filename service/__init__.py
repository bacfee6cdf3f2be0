"""What a request reaches: the chat API, votes, the operator's API, the pages. Imports neither torch nor vllm."""
