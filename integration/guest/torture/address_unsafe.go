package main

import "unsafe"

// addressOf returns where b lies in this process's address space.
func addressOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
