"""POST /tokenize and /detokenize: what the model's tokenizer, and its chat template, make of a text."""

from starlette.requests import Request
from starlette.responses import Response

from mini_vllm.engine.protocol import EngineClient
from mini_vllm.entrypoints.openai.call import served_model
from mini_vllm.entrypoints.openai.chat_prompt import ChatPrompter, Conversation
from mini_vllm.entrypoints.openai.limits import check_conversation
from mini_vllm.entrypoints.openai.tokenize_request import DetokenizeRequest, TokenizeRequest
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.state import ServerState, state_of
from mini_vllm.exceptions import InvalidParameterError


async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    state = state_of(request)
    served_model(state, body.model)
    ids = await _token_ids(state, body)
    tokenizer = state.engine.get_tokenizer()
    return json_response(
        {
            "count": len(ids),
            "max_model_len": state.engine.max_model_len,
            "tokens": ids,
            "token_strs": tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
        }
    )


async def _token_ids(state: ServerState, body: TokenizeRequest) -> list[int]:
    """Of any length: a text that is too long for the model is just what this endpoint is asked about."""
    prompter = ChatPrompter(state)
    text = body.prompt
    if text is None:
        check_conversation(body, state.args)
        text = await prompter.text(_conversation(body))
    add_special_tokens = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
    return await state.engine.run_text_work(lambda: state.engine.get_tokenizer().encode(text, add_special_tokens))


def _conversation(body: TokenizeRequest) -> Conversation:
    return Conversation(
        messages=body.messages or [],
        add_generation_prompt=body.opens_answer,
        continue_final_message=bool(body.continue_final_message),
        tools=body.tools,
        documents=body.documents,
        chat_template=body.chat_template,
        variables=body.chat_template_kwargs or {},
    )


async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    state = state_of(request)
    served_model(state, body.model)
    _check_ids(state.engine, body.tokens)
    text = await state.engine.run_text_work(
        lambda: state.engine.get_tokenizer().decode(body.tokens, skip_special_tokens=False)
    )
    return json_response({"prompt": text})


def _check_ids(engine: EngineClient, ids: list[int]) -> None:
    vocab_size = engine.input_processor.vocab_size
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise InvalidParameterError("tokens", f"{bad} is no token id: the vocabulary has ids 0 to {vocab_size - 1}")
