//go:build !amd64

package lba

func prefetchLine(uintptr) {}
