"""The second demo: a small trained Qwen2.5-VL that writes long captions of pictures of many sizes."""
