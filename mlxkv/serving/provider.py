"""The server's models: loaded by the names that mlxkv knows, each with its prompts on disk."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mlx_lm import server

from mlxkv import stock
from mlxkv.errors import InputError, MlxkvError, UnsupportedError
from mlxkv.live import LayerCache
from mlxkv.lm.loading import located, name_for_mlx_lm, not_loaded, use_fast_type

if TYPE_CHECKING:
    from mlxkv.store import PromptStore
    from mlxkv.store.learning import Learning

log = logging.getLogger("mlxkv.serving")
DEFAULT = "default_model"  # what mlx-lm's server calls the one of --model


class Provider(server.ModelProvider):
    """mlx-lm's provider of models, one at a time.

    Its methods but `learning` belong to the thread that generates.

    Parameters
    ----------
    arguments
        What mlx-lm's server read from the command line.
    open_store
        Returns the prompts on disk of a model by model and name; None where nothing is stored.
    changed
        Called with the key of the model and its prompts on disk after a model was loaded, and with None and None before it
        is given up.
    learnt_quality
        Quality at which artifacts that are learnt from what is stored will be used; None for learning none.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        open_store: Callable[[Any, str], PromptStore] | None,
        changed: Callable[[Any, PromptStore | None], None],
        learnt_quality: float | None = None,
    ) -> None:
        self._open_store, self._changed, self._quality = open_store, changed, learnt_quality
        self._learning: Learning | None = None
        self._default_name = self.name = arguments.model
        self.prompts: PromptStore | None = None
        for option in ("model", "draft_model"):
            if getattr(arguments, option) is not None:
                located(getattr(arguments, option))  # a name that cannot be one is told before anything starts
                setattr(arguments, option, name_for_mlx_lm(getattr(arguments, option)))
        super().__init__(arguments)

    def reset(self) -> None:
        """Give the model up."""
        prompts, self.prompts = self.prompts, None
        learning, self._learning = self._learning, None
        if learning is not None:
            learning.close()
        if prompts is not None:  # what waits is still written
            self._changed(None, None)
        super().reset()

    def learn(self) -> bool:
        """Learn a little from what is stored.

        Returns
        -------
        bool
            Whether there is more to do now.
        """
        return self._learning is not None and self._learning.step()

    def learning(self) -> dict[str, Any] | None:
        """Return how far learning is; any thread may ask.

        Returns
        -------
        dict or None
            `Learning.statistics()`; None where nothing is learnt.
        """
        return None if (learning := self._learning) is None else learning.statistics()

    def load(
        self, model_path: str | None, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Load a model, if it is not the one that is there.

        Parameters
        ----------
        model_path
            A name as `mlxkv.lm.load` takes it, or "default_model".
        adapter_path
            Folder of an adapter.
        draft_model_path
            A draft model, or "default_model".

        Returns
        -------
        tuple
            Model and tokenizer.

        Raises
        ------
        InputError
            When there is no such model. A name that cannot be one leaves the model that is there.
        """
        if model_path == DEFAULT and self.cli_args.model is None:
            raise InputError("the server was started without --model: a request has to name one")
        names = [model_path, draft_model_path]
        for i, name in enumerate(names):
            if name not in (None, DEFAULT):
                located(str(name))
                names[i] = name_for_mlx_lm(str(name))
        self.name = self._default_name if model_path == DEFAULT else model_path
        return super().load(names[0], adapter_path, names[1])  # type: ignore[no-untyped-call]

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        """Load a model in place of the one that is there."""
        try:
            super()._load(model_path, adapter_path, draft_model_path)  # type: ignore[no-untyped-call]
        except MlxkvError:
            raise
        except Exception as error:  # as `mlxkv.lm.load` has it
            raise not_loaded(str(self.name), error) from error
        for model in (self.model, self.draft_model):
            if model is not None:
                use_fast_type(model)
        self._check_batches()
        self._find_prompts()
        stored = "" if self.prompts is None else f", prompts are stored as {self.prompts.codings.current.name}"
        log.info("%s is loaded%s", self.name, stored)

    def _check_batches(self) -> None:
        """Answer one request at a time where live caches of the model cannot be in a batch."""
        caches = server.make_prompt_cache(self.model)  # type: ignore[attr-defined]  # the one that was replaced
        live = [entry for entry in stock.entries(caches) if isinstance(entry, LayerCache)]
        try:
            for entry in live[:1] if self.is_batchable else ():
                entry.merge([entry])
        except UnsupportedError as error:
            log.warning("requests to %s are answered one at a time: %s", self.name, error)
            self.is_batchable = False

    def _find_prompts(self) -> None:
        """Open what the store has of the model."""
        if self._open_store is None:
            return
        try:
            if self.draft_model is not None:
                raise UnsupportedError("the caches of draft models are not stored")
            if self.cli_args.kv_bits is not None:
                raise UnsupportedError(
                    "caches of --kv-bits are not stored", "--cache int8 or int4 are, and take as few bytes"
                )
            self.prompts = self._open_store(self.model, str(self.name))
        except UnsupportedError as error:
            log.warning("the prompts of %s stay in memory alone: %s", self.name, error)
            return
        self.prompts.codings.warm(self.prompts.form.dtype)
        self._changed(self.model_key, self.prompts)
        if self._quality is not None:
            self._learning = self._learner(self.prompts, self._quality)

    def _learner(self, prompts: PromptStore, quality: float) -> Learning:
        """Return what learns from stored prompts."""
        from mlxkv.store.learning import Learning  # with all that calibrates

        def ready(_: Any) -> None:
            prompts.codings.refresh()

        def texts() -> Iterator[list[int]]:
            return (tokens.tolist() for tokens in prompts.texts())

        return Learning(
            self.model, name=str(self.name), fingerprint=prompts.fingerprint, spec=prompts.form.spec, prompts=texts,
            ready=ready, tokenizer=self.tokenizer, quality=quality,
        )  # fmt: skip
