"""meki-serve: models behind HTTP, in the forms of well-known APIs. Needs the extra `serve`.

app.py puts it together. A protocol is a module with a list of `Endpoint`s (endpoint.py): the body that one takes, and a
function from a `Call` and that body to a response. Errors are `ApiError`s (errors.py), written in each API's form.
"""
