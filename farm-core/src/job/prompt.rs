//! One line of a prompt file becomes a [`RenderRequest`](super::spec::RenderRequest), or an error with its column.
