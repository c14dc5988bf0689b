"""Get embeddings with the official OpenAI client: `python docs/examples/openai_client.py` (pip install openai)."""

import os

import openai

url = os.environ.get("ISTHMUS_URL", "http://127.0.0.1:8000")
client = openai.OpenAI(base_url=url + "/v1", api_key="none")  # a key of yours, where one is needed
texts = ["a handwritten seven", "someone says seven"]

packed = client.embeddings.create(model="digits", input=texts)  # base64 on the wire, which the client asks for
plain = client.embeddings.create(model="digits", input=texts, encoding_format="float")
for text, one, other in zip(texts, packed.data, plain.data, strict=True):
    print(f"{text}: {len(one.embedding)} numbers, the same both ways: {one.embedding == other.embedding}")
