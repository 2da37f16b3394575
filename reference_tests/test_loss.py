"""The reward-weighted loss against a float64 formula, its derivatives, autocast and torch.compile, and its errors."""

import pytest
import torch

from minialign import reward_weighted_loss

MIXED = torch.tensor([False, True, False, True, True, False])
ROWS = {"mixed": MIXED, "all model": torch.zeros(6, dtype=torch.bool), "all pretrain": torch.ones(6, dtype=torch.bool)}


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 6, 4, 5, 3, generator=g).to(dtype)
    return prediction.requires_grad_(), target, torch.rand(6, generator=g)


def formula(prediction, target, reward, pretrain, beta):
    """Lee et al. 2023, equation 3, row by row in float64: value and gradient."""
    prediction = prediction.detach().double().requires_grad_()
    terms = {False: [], True: []}
    for i in range(len(prediction)):
        error = ((target[i].double() - prediction[i]) ** 2).mean()
        terms[bool(pretrain[i])].append(beta * error if pretrain[i] else reward[i].double() * error)
    value = sum(sum(rows) / len(rows) for rows in terms.values() if rows)
    return value.detach(), torch.autograd.grad(value, prediction)[0]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_value_and_gradient_equal_the_float64_formula(rows, beta):
    prediction, target, reward = batch()
    value = reward_weighted_loss(prediction, target, reward, ROWS[rows], beta)
    (gradient,) = torch.autograd.grad(value, prediction)
    expected, expected_gradient = formula(prediction, target, reward, ROWS[rows], beta)
    assert value.dtype == torch.float32 and value.shape == ()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-9)


def test_without_pretrain_every_row_is_the_models_own():
    prediction, target, reward = batch()
    value = reward_weighted_loss(prediction, target, reward)
    torch.testing.assert_close(value, reward_weighted_loss(prediction, target, reward, ROWS["all model"], 7.0))


def test_reward_of_pretraining_rows_is_ignored():
    prediction, target, reward = batch()
    changed = torch.where(MIXED, torch.full_like(reward, float("nan")), reward)
    value = reward_weighted_loss(prediction, target, changed, MIXED, 0.5)
    torch.testing.assert_close(value, reward_weighted_loss(prediction, target, reward, MIXED, 0.5))


def test_gradient_scales_with_what_follows():
    prediction, target, reward = batch()
    (plain,) = torch.autograd.grad(reward_weighted_loss(prediction, target, reward, MIXED), prediction)
    (scaled,) = torch.autograd.grad(-3 * reward_weighted_loss(prediction, target, reward, MIXED), prediction)
    torch.testing.assert_close(scaled, -3 * plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    prediction, target, reward = batch(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = reward_weighted_loss(prediction, target, reward, MIXED, 0.5)
    (gradient,) = torch.autograd.grad(value, prediction)
    expected, expected_gradient = formula(prediction, target, reward, MIXED, 0.5)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_compiles_without_a_graph_break(rows):
    torch.compiler.reset()
    compiled = torch.compile(reward_weighted_loss, fullgraph=True, backend="aot_eager")
    prediction, target, reward = batch()
    value = compiled(prediction, target, reward, ROWS[rows], 0.5)
    (gradient,) = torch.autograd.grad(value, prediction)
    expected, expected_gradient = formula(prediction, target, reward, ROWS[rows], 0.5)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-9)


# inductor starts a C++ compiler: 20 s
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_under_bfloat16_autocast(backend):
    torch.compiler.reset()
    layer = torch.nn.Linear(3, 3)
    _, target, reward = batch()

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return reward_weighted_loss(layer(x), target, reward, MIXED, 0.5)

    x = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=backend)(x), step(x), rtol=1e-3, atol=1e-5)


def plain(prediction, target, reward, pretrain, beta=0.5):
    """The same as one differentiable expression in float64."""
    error = (prediction.double() - target.double()).square().flatten(1).mean(1)
    own = (reward * error * ~pretrain).sum() / (~pretrain).sum().clamp(min=1)
    return own + beta * (error * pretrain).sum() / pretrain.sum().clamp(min=1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gradient_penalty_equals_the_float64_expression(rows, autocast):
    """L + |dL/dp|^2 of p = w x, differentiated by w, where targets and rewards that ask for gradients get none."""
    x, target, reward = batch()
    found = {}
    for loss in (reward_weighted_loss, plain):
        w = torch.tensor(1.5, requires_grad=True)
        data = (target.clone().requires_grad_(), reward.clone().requires_grad_()) if loss is not plain else ()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = w * x.detach()
            value = loss(prediction, *(data or (target, reward)), ROWS[rows], 0.5)
            (gradient,) = torch.autograd.grad(value, prediction, create_graph=True)
            (value + gradient.double().square().sum()).backward()
        assert all(tensor.grad is None for tensor in data)
        found[loss] = w.grad
    torch.testing.assert_close(found[reward_weighted_loss], found[plain], rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", ROWS)
def test_gradients_of_both_orders_by_finite_differences(rows):
    """The loss is quadratic, so that wide central differences are exact up to the rounding of float32."""
    prediction, target, reward = batch(torch.float64)

    def loss(p):
        return reward_weighted_loss(p, target, reward, ROWS[rows], 0.5).double()

    how = {"eps": 0.5, "atol": 1e-5, "rtol": 1e-4}
    assert torch.autograd.gradcheck(loss, (prediction,), **how)
    assert torch.autograd.gradgradcheck(loss, (prediction,), grad_outputs=torch.ones((), dtype=torch.float64), **how)


@pytest.mark.parametrize("at_target", [False, True])
def test_hessian_vector_product_is_2_w_v(at_target):
    prediction, target, reward = batch()
    prediction = target.clone() if at_target else prediction.detach()  # the norm alone has no second derivative at 0
    v = torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
    weight = torch.where(MIXED, 0.5 / 3, reward.double() / 3) / target[0].numel()
    expected = (2 * weight[:, None, None, None] * v).float()
    products = (
        torch.autograd.functional.hvp(lambda p: reward_weighted_loss(p, target, reward, MIXED, 0.5), prediction, v)[1],
        torch.func.vjp(torch.func.grad(lambda p: reward_weighted_loss(p, target, reward, MIXED, 0.5)), prediction)[1](
            v
        )[0],
    )
    for product in products:
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-9)


def test_torch_func_equals_the_float64_expression():
    prediction, target, reward = batch()
    prediction, func = prediction.detach(), torch.func

    def alone(loss):  # of one row
        return lambda p, t, r, row: loss(p[None], t[None], r[None], row[None], 0.5)

    for transform in (
        lambda loss: func.grad(loss)(prediction, target, reward, MIXED, 0.5),
        lambda loss: func.vjp(lambda p: loss(p, target, reward, MIXED, 0.5), prediction)[1](torch.tensor(2.0))[0],
        lambda loss: func.vmap(func.grad(alone(loss)))(prediction, target, reward, MIXED),  # per-sample gradients
        # one prediction under several rewards, or targets
        lambda loss: func.vmap(lambda r: func.grad(loss)(prediction, target, r, MIXED, 0.5))(
            torch.stack([reward, 1 - reward])
        ),
        lambda loss: func.vmap(lambda t: loss(prediction, t, reward, MIXED, 0.5))(torch.stack([target, -target])),
    ):
        mine, expected = transform(reward_weighted_loss), transform(lambda *a: plain(*a).float())
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_what_is_empty_has_the_loss_0(shape):
    prediction = torch.zeros(shape, requires_grad=True)
    for pretrain in (None, torch.ones(shape[0], dtype=torch.bool)):
        value = reward_weighted_loss(prediction, torch.zeros(shape), torch.ones(shape[0]), pretrain)
        (gradient,) = torch.autograd.grad(value, prediction)
        assert value == 0 and gradient.shape == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), "prediction (2, 3) and target (2, 4)"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), "must both be (B, ...)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), "reward must have shape (2,)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1)), "reward must have shape (2,)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.zeros(2)), "pretrain must be bool"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.zeros(1).bool()), "pretrain must be bool"),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        reward_weighted_loss(*arguments)
    assert message in str(error.value)


def test_the_file_imports_torch_alone():
    import ast
    import inspect

    import minialign.loss

    tree = ast.parse(inspect.getsource(minialign.loss))
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert names <= {"__future__", "torch"}
