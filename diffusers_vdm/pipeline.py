"""The pipeline: images from noise, with our schedulers or those of diffusers."""

import inspect
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Union

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

# diffusers finds the classes of a saved pipeline only in modules that are loaded by then: schedulers, too
from . import call_arguments, denoiser, diffusion, repository
from .diffusion import Generators
from .gamma_scheduler import GammaScheduler
from .noise_schedules import (
    BetaGamma,
    FixedLinearGamma,
    LearnedLinearGamma,
    LinearBetaGamma,
    MonotoneGammaNetwork,
    TableGamma,
)
from .schedulers import LinearBetaScheduler, VDMScheduler
from .unet import VDMUNet2DModel

# diffusers reads these annotations, old ones neither as strings nor as `X | Y`; `from_pipe` compares exact classes
_Network = Union[VDMUNet2DModel, UNet2DModel]  # noqa: UP007
_Schedule = Union[  # noqa: UP007
    FixedLinearGamma, LearnedLinearGamma, MonotoneGammaNetwork, LinearBetaGamma, BetaGamma, TableGamma, None
]  # fmt: skip

_OURS: tuple[type, ...] = (
    *(VDMUNet2DModel, VDMScheduler, LinearBetaScheduler),
    *(FixedLinearGamma, LearnedLinearGamma, MonotoneGammaNetwork, LinearBetaGamma, BetaGamma, TableGamma),
)
_NO_PICKLES = "safe_serialization must be True, got False: nobody should have to unpickle weights."
_REFUSED: dict[str, str] = {
    "custom_pipeline": "VDMPipeline runs no code of a repository; DiffusionPipeline.from_pretrained does",
    "proxies": "set the environment's HTTPS_PROXY",
    "use_onnx": "VDMPipeline reads safetensors",
    "dduf_file": "VDMPipeline reads safetensors",
    "subfolder": "a pipeline stands at the root; components load from a subfolder, by their own classes",
}


class VDMPipeline(DiffusionPipeline):
    """Unconditional or class-conditional image generation with a VDM or a DDPM.

    Args:
        unet ([`VDMUNet2DModel`] or `UNet2DModel`): the network.
        scheduler ([`VDMScheduler`], [`LinearBetaScheduler`], or a scheduler of diffusers): the sampler.
        noise_schedule ([`NoiseSchedule`], *optional*): the trainable γ(t), kept so that training can go on from a
            saved pipeline. Sampling reads γ from the scheduler's own table only.
        num_levels (`int`, defaults to 256): levels of the data that the model was trained on.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["noise_schedule"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: _Network,
        scheduler: SchedulerMixin,
        noise_schedule: _Schedule = None,
        num_levels: int = 256,
    ):
        super().__init__()
        if not 2 <= num_levels <= 256:
            raise ValueError(f"num_levels must be within [2, 256] to make images, got {num_levels}.")
        self.register_modules(unet=unet, scheduler=scheduler, noise_schedule=noise_schedule)
        self.register_to_config(num_levels=num_levels)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "VDMPipeline":
        """Loads a pipeline from a folder or from the Hub. Nothing of either is run or unpickled.

        Fetches what is needed alone: JSON and safetensors, of one commit, compared with the hashes that the Hub lists.
        Before anything is loaded, it refuses names that lead out of the folder, weights that are pickles, headers of
        safetensors that are too long or do not describe their file, classes of modules that nobody has imported, and
        code that diffusers would run. Other code and pickles in a repository are neither fetched nor read, and
        `trust_remote_code` changes nothing. Components that are passed (`unet=…`) are neither fetched nor checked.

        Diffusers itself, by `DiffusionPipeline.from_pretrained` or for a component alone
        (`VDMUNet2DModel.from_pretrained`), falls back to `.bin` files where there are no safetensors
        (`use_safetensors=True` forbids that), read by torch with `weights_only=True`. It runs code with
        `trust_remote_code=True` only; 0.35.1 runs that of a component in a folder, and a None.py, without asking.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or `"user/name"` on the Hub.
            revision (`str`, *optional*): a branch, a tag, a commit or `"refs/pr/1"`.
            variant (`str`, *optional*): the weights' variant, like `"fp16"` or `"ema"`; components without it are
                loaded without it, but one must have it.
            token (`str` or `bool`, *optional*): the token for private repositories, or `False` to send none.
            cache_dir, force_download, local_files_only, torch_dtype (dtype), device_map, …: as in
                [`DiffusionPipeline.from_pretrained`]. If the Hub does not answer, the cache is used, with a warning.
            unet, scheduler, noise_schedule, num_levels: instead of what was saved.

        Returns: `VDMPipeline`, in evaluation mode.
        Raises: `OSError` for what is not there, may not be read or comes damaged; `ValueError` for what is refused.
        """
        for name, fix in _REFUSED.items():
            if kwargs.get(name):
                raise ValueError(f"{name} must not be given, got {kwargs[name]!r}: {fix}.")
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors must not be False: other weights are pickles, which run code when read.")
        variant = kwargs.get("variant")
        if variant is not None and not re.fullmatch(r"[\w-]+", variant):
            raise ValueError(f"variant must be without a dot, a plain word that diffusers can find, got {variant!r}.")
        if not os.path.isdir(pretrained_model_name_or_path):
            repository.check_repository_name(os.fspath(pretrained_model_name_or_path))
        else:
            folder = Path(pretrained_model_name_or_path)
            where = os.fspath(pretrained_model_name_or_path)
            names = repository.names_in(folder)
            if repository.INDEX not in names:
                raise OSError(f"{where} has no {repository.INDEX}: it is not a pipeline.")
            repository.check_files(folder, cls._needed_files(folder, names, where, kwargs), where)
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> str:
        """Fetches what `from_pretrained` needs into the cache, checks it, and returns its folder; see there.

        Instead of diffusers' own, which refuses components of other packages (its issue 6563).
        """
        where = str(pretrained_model_name)
        given = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
        options = {name: kwargs[name] for name in given if kwargs.get(name) is not None}

        def choose(folder: Path, names: Collection[str]) -> list[str]:
            return cls._needed_files(folder, names, where, kwargs)

        folder = repository.fetch(where, choose, **options)
        # by the names that are there: the cache may hold more of this commit, from other loads
        files = cls._needed_files(folder, repository.names_in(folder), where, kwargs)
        repository.check_files(folder, files, where)
        return str(folder)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As [`DiffusionPipeline.save_pretrained`], but what `from_pretrained` would refuse is not written.

        Raises: `ValueError` for pickles (`safe_serialization=False`) and other formats than safetensors.
        """
        if not safe_serialization:
            raise ValueError(_NO_PICKLES)
        if kwargs.get("use_flashpack"):
            raise ValueError("use_flashpack must be left out: VDMPipeline reads safetensors.")
        super().save_pretrained(
            save_directory, True, variant=variant, max_shard_size=max_shard_size, push_to_hub=push_to_hub, **kwargs
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        include_code: bool = False,
        run_dir: str | os.PathLike | None = None,
        license: str | None = None,
    ) -> Any:
        """As [`DiffusionPipeline.push_to_hub`], with a card that is made of what was measured.

        A card that somebody has edited on the Hub stays as it is. All is made before anything is sent, in one commit.

        Args (additions):
            include_code (`bool`, defaults to `False`): add this package's code, so that the repository also loads by
                `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` where the package is not installed.
            run_dir (`str` or `os.PathLike`, *optional*): the folder of the run that this pipeline was loaded from; its
                numbers, options, report and pictures go along, and into the card.
            license (`str`, *optional*): as the Hub names it, `"apache-2.0"`.

        Returns: the Hub's `CommitInfo`.
        Raises: `ValueError` for a pipeline that is not that of `run_dir`, for pickles (`safe_serialization=False`) and
            a `subfolder`; `OSError` where the Hub refuses.
        """
        from .sharing.publish import publish

        if subfolder is not None:
            raise ValueError(
                f"subfolder must not be given, got {subfolder!r}: a pipeline stands at the root of its repository; "
                "push it to one of its own."
            )
        if not safe_serialization:
            raise ValueError(_NO_PICKLES)
        arguments = {"include_code": include_code, "run_dir": run_dir, "license": license, "variant": variant}
        arguments |= {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        return publish(self, repo_id, **arguments)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As [`ConfigMixin.load_config`], with our classes in our modules, wherever the file says that they are."""
        loaded = super().load_config(*args, **kwargs)
        if isinstance(loaded, tuple):
            return cls._canonical(loaded[0]), *loaded[1:]
        return cls._canonical(loaded)

    @staticmethod
    def _canonical(index: dict[str, Any]) -> dict[str, Any]:
        return repository.canonical_index(index, {ours.__name__: ours.__module__ for ours in _OURS})

    @classmethod
    def _needed_files(cls, folder: Path, names: Collection[str], where: str, kwargs: dict[str, Any]) -> list[str]:
        """The files to load of those in a folder or on the Hub, whose `model_index.json` is in `folder`."""
        index = cls._canonical(repository.read_json(folder / repository.INDEX, f"{repository.INDEX} of {where}"))
        expected, _ = cls._get_signature_keys(cls)
        needed = [name for name in expected if name not in kwargs]
        classes = repository.component_classes(index, needed, names, where)
        return repository.needed_files(names, classes, kwargs.get("variant"), where)

    @property
    def device(self) -> torch.device:
        """The network's. Diffusers would ask the first module in alphabetical order, the noise schedule."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's; noise schedules stay in float32."""
        return self.unet.dtype

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call that runs, or of the last one."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        generator: Generators | tuple[torch.Generator, ...] = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        timesteps: list[float] | None = None,
        latents: torch.Tensor | None = None,
        decode: str = "mode",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VDMPipeline", int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        num_images_per_prompt: int = 1,
    ) -> ImagePipelineOutput | tuple:
        """Draws images by the scheduler's steps, and decodes the last latent through p(x | z_0).

        Args:
            batch_size (`int`, *optional*): number of images; defaults to what `class_labels` ask for, else to 1.
            num_inference_steps (`int`, *optional*, defaults to 250): steps; more are slower and nearer to the model.
            generator (`torch.Generator` or a list or tuple of `batch_size` of them, *optional*): with a list, each
                image depends on its own generator only, whatever the batch.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): classes, one for all or one for each.
            timesteps (`list`, *optional*): timesteps of one's own, decreasing, for schedulers that take them, instead
                of `num_inference_steps`.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): z_1 to start from, standard normal.
            decode (`"mode"` or `"sample"`, defaults to `"mode"`): the most probable level of p(x | z_0), or a draw.
            output_type (`"pil"`, `"np"`, `"pt"` or `"latent"`, defaults to `"pil"`):
                PIL images; arrays `(B, H, W, C)` or tensors `(B, C, H, W)` of the levels k/(num_levels − 1) in [0, 1];
                or z_0 as it is.
            return_dict (`bool`, defaults to `True`): return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `f(pipe, step, timestep, tensors)` after every
                step; may return a dict with `latents` to go on from.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): what it is given, defaults to `["latents"]`.
            num_images_per_prompt (`int`, defaults to 1): images for each of `class_labels`, those of one label behind
                each other. `batch_size`, if given, is the number of all of them.

        Returns: `ImagePipelineOutput` with `images`, or a tuple with them.
        Raises: `ValueError` or `TypeError` for arguments that are not what they must be, or do not fit each other, the
            network or the scheduler, before any work is done. NumPy's integers are integers, booleans are not.
        """
        device = self._execution_device
        batch_size, labels = self._batch_and_labels(batch_size, class_labels, num_images_per_prompt)
        generator = call_arguments.generators(generator, batch_size, device)
        call_arguments.one_of("decode", decode, ("mode", "sample"))
        call_arguments.one_of("output_type", output_type, ("pil", "np", "pt", "latent"))
        return_dict = call_arguments.boolean("return_dict", return_dict)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be callable, got a {type(callback_on_step_end).__name__}.")
        tensor_names = self._callback_tensor_inputs
        if callback_on_step_end_tensor_inputs is not None:
            name = "callback_on_step_end_tensor_inputs"
            tensor_names = call_arguments.names_among(name, callback_on_step_end_tensor_inputs, tensor_names)
        shape = (batch_size, *self.image_shape)
        if latents is not None:
            latents = call_arguments.latents(latents, shape)
        self._set_timesteps(num_inference_steps, timesteps, device)

        if labels is not None:
            labels = labels.to(device)
        if latents is None:
            # float32 whatever the network's type: a half-precision latent has no room for the last steps
            dtype = denoiser.working_dtype(self.unet)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device) * self.scheduler.init_noise_sigma
        step_kwargs = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                model_input = self.scheduler.scale_model_input(latents, t).to(latents.dtype)
                model_output = denoiser.call_network(self.unet, model_input, t, class_labels=labels)
                model_output = self._for_the_step(model_output, latents)
                latents = self.scheduler.step(model_output, t, latents, return_dict=False, **step_kwargs)[0]
                if callback_on_step_end is not None:
                    available = {"latents": latents}
                    given = {name: available[name] for name in tensor_names}
                    latents = self._taken_back(callback_on_step_end(self, i, t, given), latents)
                progress_bar.update()

        images = latents if output_type == "latent" else self._images(latents, decode, output_type, generator)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _for_the_step(self, model_output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The channels of a network's output that the scheduler's step takes, see denoiser.py."""
        if isinstance(self.scheduler, GammaScheduler):
            return model_output
        prediction, values = denoiser.split_output(model_output, latents)
        if not isinstance(self.scheduler, DDPMScheduler | DDPMParallelScheduler):
            return prediction  # others know no variance of a network, or cut off all channels but three
        denoiser.check_variance_values(self.scheduler.config.variance_type, values)
        return model_output

    def _images(self, latents: torch.Tensor, decode: str, output_type: str, generator: Generators):
        """z_0 to images through p(x | z_0), at the noise level where the scheduler stopped."""
        gamma = getattr(self.scheduler, "final_gamma", torch.tensor(-math.inf, dtype=torch.float64))
        num_levels = self.config.num_levels
        levels = diffusion.decode(latents, gamma, num_levels, draw=decode == "sample", generator=generator)
        pixels = levels.to(torch.float32) / (num_levels - 1)
        if output_type == "pt":
            return pixels
        array = pixels.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _taken_back(self, returned: dict[str, Any] | None, latents: torch.Tensor) -> torch.Tensor:
        """The latents that a callback wants to go on from."""
        if returned is None:
            return latents
        if not isinstance(returned, dict) or not set(returned) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end must return None or a dict with keys among {self._callback_tensor_inputs}, "
                f"got {sorted(returned) if isinstance(returned, dict) else type(returned).__name__}."
            )
        new = returned.get("latents", latents)
        if not torch.is_tensor(new) or new.shape != latents.shape:
            raise ValueError(f"callback_on_step_end must return latents of shape {tuple(latents.shape)}.")
        return new.to(latents)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the images that the network is made for; `ValueError` if its config does not say it."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("unet.config.sample_size is not set; build the network with the size of its images.")
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _batch_and_labels(
        self, batch_size: int | None, class_labels: Any, num_images_per_prompt: int
    ) -> tuple[int, torch.Tensor | None]:
        """The number of images, and the class of each, if there are classes; see `__call__`."""
        if batch_size is not None:
            batch_size = call_arguments.positive_integer("batch_size", batch_size)
        each = call_arguments.positive_integer("num_images_per_prompt", num_images_per_prompt)
        if class_labels is None:
            if each > 1:
                raise ValueError(
                    f"num_images_per_prompt must go with class_labels, got {each} without any; give batch_size={each} "
                    "for as many images without labels."
                )
            self.check_labels(None)
            return batch_size or 1, None
        labels = call_arguments.labels(class_labels)
        self.check_labels(labels)
        count = batch_size or labels.numel() * each
        if labels.ndim == 0 and each == 1:
            labels = labels.expand(count)
        labels = labels.reshape(-1).repeat_interleave(each)
        if len(labels) != count:
            raise ValueError(
                f"class_labels must be one class or {count} of them, got {len(labels) // each}"
                + (f" with num_images_per_prompt={each}, which makes {len(labels)} images" if each > 1 else "")
                + f"; leave batch_size={count} out, or give that of all images."
            )
        return count, labels

    def check_labels(self, labels: torch.Tensor | None) -> None:
        """Raises `ValueError` unless the network takes such class labels, or none."""
        num_classes = self.unet.config.num_class_embeds
        null_class = getattr(self.unet.config, "null_class", False)
        if labels is None:
            if num_classes is not None and not null_class:
                raise ValueError(
                    f"class_labels must be given, within [0, {num_classes}): this network has no null class."
                )
            return
        if num_classes is None:
            raise ValueError("class_labels were given, but this network was trained without classes.")
        highest = num_classes + bool(null_class)
        if int(labels.min()) < 0 or int(labels.max()) >= highest:
            null = f", where {num_classes} stands for no label" if null_class else ""
            raise ValueError(f"class_labels must be within [0, {highest}){null}, got {labels.tolist()}.")

    def _set_timesteps(self, num_inference_steps: int | None, timesteps: Any, device: torch.device) -> None:
        if timesteps is None:
            steps = 250 if num_inference_steps is None else num_inference_steps
            steps = call_arguments.positive_integer("num_inference_steps", steps)
            return self.scheduler.set_timesteps(steps, device=device)
        if num_inference_steps is not None:
            raise ValueError("give either num_inference_steps or timesteps, not both.")
        numbers = call_arguments.decreasing_numbers("timesteps", timesteps)
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"timesteps must be left out, as a {type(self.scheduler).__name__} takes none of one's own; give "
                "num_inference_steps."
            )
        # diffusers' own schedulers take integers
        integers = [int(number) if number.is_integer() else number for number in numbers]
        return self.scheduler.set_timesteps(timesteps=integers, device=device)
