package lba

//go:noescape
func prefetchLine(addr uintptr)
