"""The model as a server that speaks OpenAI's API. JSON -> what is asked -> one worker's answers -> JSON.

- api_error.py  errors as OpenAI's error JSON, with their HTTP status
- fields.py  reads the fields of a request's JSON, each with its type
- served.py  what is served: the model's names, its options, the limits of a request
- asked.py  the JSON of a request -> prompts as token ids, and how to answer them
- messages.py  OpenAI's messages -> those that a chat template takes
- tools.py  the forms in which templates have tools called: found, forced, parsed
- grammar.py  JSON schemas -> which tokens may come next, by llguidance
- processors.py  what acts on a token's logits: penalties, a grammar, logprobs
- reply.py  an answer's text, as it comes -> reply, thinking and calls of tools
- respond.py  one prompt -> events, on the engine
- worker.py  the queue, and the one thread that answers
- objects.py  events -> the JSON of OpenAI's objects
- metrics.py  counters for Prometheus
- app.py  the routes, on Starlette
- guard.py  who may ask: the key, the host, the size of a request
- server.py  the address, the signals, and uvicorn
"""
