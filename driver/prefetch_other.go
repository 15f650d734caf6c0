//go:build !amd64

package driver

func prefetchLines(*byte) {}
