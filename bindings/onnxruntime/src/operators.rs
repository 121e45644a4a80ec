//! The two operators, each for three dtypes.

use emaudit::activations::{Element, Rows, RowsMut};
use emaudit::directions::{Directions, OpenOptions, digest};
use emaudit::{Operation, ScoreUnit, Steering, SteeringOptions};
use ort::operator::{BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::{PrimitiveTensorElementType, TensorElementType, ValueRef};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// `Probe(rows) -> scores`: float32 of the shape of `rows` without the width; NaN for a row that is not finite.
pub struct Probe<T>(pub PhantomData<fn(T)>);

/// `Steer(rows, strengths?) -> (rows, scores)`: the rows edited, and their scores before; a row with the score NaN, and only such a
/// row, was left alone because it, or its edit, is not finite.
pub struct Steer<T>(pub PhantomData<fn(T)>);

fn refuse(error: emaudit::Error) -> ort::Error {
    ort::Error::new(format!("emaudit: {error}"))
}

fn invalid(sentence: impl Into<String>) -> ort::Error {
    refuse(emaudit::Error::InvalidArgument(sentence.into()))
}

/// Runs a call of ONNX Runtime's, over whose boundary no panic may go.
fn guarded<R>(call: impl FnOnce() -> ort::Result<R>) -> ort::Result<R> {
    let caught = catch_unwind(AssertUnwindSafe(call));
    caught.unwrap_or_else(|_| Err(refuse(emaudit::Error::Panic("in an operator".into()))))
}

/// The probe that the attributes `directions`, `layer`, `digest` and `unit` name.
fn open(context: &KernelContext<'_>) -> ort::Result<(emaudit::Probe, ScoreUnit)> {
    let path: String =
        context.get("directions").ok_or_else(|| invalid("the attribute `directions` is missing"))?;
    let layer: i64 = context.get("layer").ok_or_else(|| invalid("the attribute `layer` is missing"))?;
    let layer = u32::try_from(layer).map_err(|_| invalid(format!("{layer} is no layer")))?;
    let pinned = context.get::<String>("digest").filter(|hex| !hex.is_empty());
    let expected_digest = pinned.map(|hex| digest::from_hex(&hex)).transpose().map_err(refuse)?;
    let options = OpenOptions { expected_digest, ..OpenOptions::default() };
    let directions = Directions::open(path, &options).map_err(refuse)?;
    let unit = match context.get::<String>("unit").as_deref() {
        None | Some("aligned_sd") => ScoreUnit::AlignedSd,
        Some("raw") => ScoreUnit::Raw,
        Some(other) => {
            return Err(invalid(format!("`{other}` is no score unit; there are aligned_sd and raw")));
        }
    };
    Ok((emaudit::Probe::new(Arc::new(directions), layer).map_err(refuse)?, unit))
}

fn steering(context: &KernelContext<'_>, probe: &emaudit::Probe) -> ort::Result<Steering> {
    let parameter = |name: &str| context.get::<f32>(name);
    let operation = match (parameter("subtract"), parameter("project_out"), parameter("clamp")) {
        (Some(alpha), None, None) => Operation::Subtract { alpha },
        (None, Some(alpha), None) => Operation::ProjectOut { alpha },
        (None, None, Some(ceiling)) => Operation::Clamp { ceiling },
        _ => {
            return Err(invalid("give exactly one of the attributes `subtract`, `project_out` and `clamp`"));
        }
    };
    let options = SteeringOptions {
        operation,
        gate: parameter("gate"),
        dose_limit: parameter("dose_limit"),
        allow_nonspecific: context.get::<i64>("allow_nonspecific") == Some(1),
    };
    Steering::new(probe, options).map_err(refuse)
}

fn input<'a>(context: &'a ComputeContext, index: usize) -> ort::Result<ValueRef<'a>> {
    context.input(index)?.ok_or_else(|| invalid("an input is missing"))
}

/// The shape without the width, and the number of rows.
fn leading(shape: &[i64], probe: &emaudit::Probe) -> ort::Result<(Vec<i64>, usize)> {
    let Some((&width, leading)) = shape.split_last() else {
        return Err(invalid("a single number is no row; the last dimension is the width"));
    };
    if width != probe.width() as i64 {
        return Err(refuse(emaudit::Error::WidthMismatch {
            expected: probe.width(),
            found: width.max(0) as usize,
        }));
    }
    Ok((leading.to_vec(), leading.iter().product::<i64>().max(0) as usize))
}

/// A row that is not finite is flagged by its score; the others are done all the same.
fn but_for_rows<R>(outcome: emaudit::Result<R>) -> ort::Result<()> {
    match outcome {
        Ok(_) | Err(emaudit::Error::NonFinite { .. }) => Ok(()),
        Err(error) => Err(refuse(error)),
    }
}

fn missing() -> ort::Error {
    invalid("an output is missing")
}

fn probe_rows<T: Element + PrimitiveTensorElementType>(
    context: &ComputeContext,
    probe: &emaudit::Probe,
    unit: ScoreUnit,
) -> ort::Result<()> {
    let rows = input(context, 0)?;
    let (shape, values) = rows.try_extract_tensor::<T>()?;
    let (leading, count) = leading(shape, probe)?;
    let mut scores = context.output(0, leading)?.ok_or_else(missing)?;
    let (_, scores) = scores.try_extract_tensor_mut::<f32>()?;
    let rows = Rows::new(values, count, probe.width(), probe.width()).map_err(refuse)?;
    but_for_rows(probe.score(&rows, unit, scores, None))
}

fn steer_rows<T: Element + PrimitiveTensorElementType>(
    context: &ComputeContext,
    steering: &Steering,
    unit: ScoreUnit,
) -> ort::Result<()> {
    let probe = steering.probe();
    let rows = input(context, 0)?;
    let (shape, values) = rows.try_extract_tensor::<T>()?;
    let (leading, count) = leading(shape, probe)?;
    let given = match context.num_inputs()? {
        2.. => context.input(1)?,
        _ => None,
    };
    let strengths = match &given {
        None => None,
        Some(given) => {
            let (of, strengths) = given.try_extract_tensor::<f32>()?;
            if **of != *leading {
                let sentence = format!("strengths of shape {:?} for rows of shape {leading:?}", &**of);
                return Err(invalid(sentence));
            }
            Some(strengths)
        }
    };
    let mut edited = context.output(0, shape.to_vec())?.ok_or_else(missing)?;
    let mut scores = context.output(1, leading)?.ok_or_else(missing)?;
    let (_, edited) = edited.try_extract_tensor_mut::<T>()?;
    let (_, scores) = scores.try_extract_tensor_mut::<f32>()?;
    edited.copy_from_slice(values);
    let mut rows = RowsMut::new(edited, count, probe.width(), probe.width()).map_err(refuse)?;
    let mut status = vec![emaudit::RowStatus::Ok; count];
    but_for_rows(steering.score_and_apply(&mut rows, unit, scores, strengths, Some(&mut status)))?;
    // An edit may be refused where the score is finite: that too must show.
    let unedited = |status: &emaudit::RowStatus| *status == emaudit::RowStatus::NonFinite;
    scores.iter_mut().zip(&status).filter(|(_, s)| unedited(s)).for_each(|(score, _)| *score = f32::NAN);
    Ok(())
}

impl<T: Element + PrimitiveTensorElementType> Operator for Probe<T> {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &str {
        "Probe"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(T::into_tensor_element_type())]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<BoxedKernel<'attr>> {
        guarded(|| {
            let (probe, unit) = open(context)?;
            let kernel = move |context: &ComputeContext| guarded(|| probe_rows::<T>(context, &probe, unit));
            Ok(Box::new(kernel) as BoxedKernel<'attr>)
        })
    }
}

impl<T: Element + PrimitiveTensorElementType> Operator for Steer<T> {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &str {
        "Steer"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(T::into_tensor_element_type()),
            OperatorInput::optional(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [
            OperatorOutput::required(T::into_tensor_element_type()),
            OperatorOutput::required(TensorElementType::Float32),
        ]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<BoxedKernel<'attr>> {
        guarded(|| {
            let (probe, unit) = open(context)?;
            let steering = steering(context, &probe)?;
            let kernel =
                move |context: &ComputeContext| guarded(|| steer_rows::<T>(context, &steering, unit));
            Ok(Box::new(kernel) as BoxedKernel<'attr>)
        })
    }
}
