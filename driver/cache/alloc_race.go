//go:build race

package cache

// array is on the Go heap here, since the race detector watches nothing else.
type array[T any] struct{ s []T }

func newArray[T any](n int) (array[T], error) { return array[T]{make([]T, n)}, nil }

func (a *array[T]) free() { *a = array[T]{} }
