// Package vfs is all that Scoria asks of a local disk. OS implements it on the
// host's file systems; Mem is its twin in memory, which can lose power (it then
// keeps what was synced and any subset or tearing of the rest), be killed
// without losing power, and inject errors.
//
// # What is durable when
//
//   - File.Sync makes the file's earlier WriteAt, Allocate, Truncate and PunchHole
//     calls durable (fdatasync). It does not make its name durable.
//   - FS.MkdirAll makes the directories that it creates durable by itself.
//   - FS.SyncDir makes earlier Create, Rename, Link and Remove calls in that
//     directory durable.
//   - Everything else may be lost, kept in part, or torn at multiples of
//     SectorSize when power is lost. Nothing is lost when only the process dies.
//   - A Mapping (Map) is memory that outlives the process but not the power.
//
// A failed Sync says nothing about what reached the disk, and a later
// successful Sync of the same file doesn't either (the kernel drops dirty pages
// that it could not write). Callers must never turn the former into the latter.
package vfs

import (
	"errors"
	"io"
	"io/fs"
)

// SectorSize is the unit in bytes that a disk writes whole or not at all.
const SectorSize = 512

// OpenFlag says how Open opens a file.
type OpenFlag uint8

const (
	// Create makes the file if it does not exist.
	Create OpenFlag = 1 << iota
	// Exclusive, with Create: fail with fs.ErrExist if it exists.
	Exclusive
	// ReadOnly opens for reading only.
	ReadOnly
	// Direct bypasses the page cache where the file system can; offsets, lengths
	// and buffers must then be multiples of 4096 bytes.
	Direct
)

// ErrLocked is returned by Lock when another process holds the lock.
var ErrLocked = errors.New("locked by another process")

// FS is a tree of files. Names use forward slashes. Errors wrap fs.ErrNotExist,
// fs.ErrExist and syscall.ENOSPC where they apply. Safe from any goroutine.
type FS interface {
	Open(name string, flags OpenFlag) (File, error)
	MkdirAll(name string) error
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// RemoveAll removes a tree; no error if there is none.
	RemoveAll(name string) error
	// Rename replaces newName atomically, unless that is a directory (fs.ErrExist).
	Rename(oldName, newName string) error
	// Link gives a file a second name; fs.ErrExist if newName exists.
	Link(oldName, newName string) error
	List(name string) ([]string, error) // base names, sorted
	Stat(name string) (fs.FileInfo, error)
	// SyncDir makes the entries of a directory durable.
	SyncDir(name string) error
	// Lock takes an exclusive lock on a file (created if need be), held until
	// the closer is closed or the process dies. ErrLocked if it is taken.
	Lock(name string) (io.Closer, error)
	// Free returns the bytes that an unprivileged writer can still use under name.
	Free(name string) (uint64, error)
	// Map maps size bytes of a file shared and writable, creating or growing it
	// (a larger file keeps its size). created says that it did not exist before
	// with that size. Pages are not populated: until the caller has done that, a
	// store can meet a full file system (SIGBUS). The contents
	// outlive the process as stores are made, without a system call; they do not
	// outlive the power unless the file lies on a disk.
	Map(name string, size int64) (m Mapping, created bool, err error)
}

// File is an open file. Safe from any goroutine.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// WriteVecAt writes bufs one behind the other from off on, with one call to
	// the disk where that is possible. It returns the bytes written.
	WriteVecAt(bufs [][]byte, off int64) (int, error)
	// WriteParts writes several parts of the file, under way at the same time
	// where the file is Direct and the host can do that. They must not overlap,
	// and no order between them may be relied upon; after an error, any of them
	// may have been written, or a piece of it. It returns the bytes known to be
	// written.
	WriteParts(parts []Part) (int, error)
	Size() (int64, error)
	Truncate(size int64) error
	// Allocate reserves room for [off, off+length) so that later writes there
	// cannot fail for want of space; it grows the file if need be.
	Allocate(off, length int64) error
	// PunchHole gives the room of [off, off+length) back; it reads as zeroes.
	PunchHole(off, length int64) error
	// Sync makes the contents durable.
	Sync() error
	// StartWriteback asks the disk to begin writing [off, off+length) and
	// promises nothing.
	StartWriteback(off, length int64) error
	// Prefetch asks the disk to begin reading [off, off+length) into the page cache,
	// and promises nothing: a read there soon waits for less.
	Prefetch(off, length int64) error
	// DropCache tells the page cache that [off, off+length) won't be needed soon.
	DropCache(off, length int64) error
}

// Part is what WriteParts writes in one place: Bufs one behind the other from
// byte Off on.
type Part struct {
	Bufs [][]byte
	Off  int64
}

// Mapping is memory shared with a file.
type Mapping interface {
	Bytes() []byte
	Close() error
}
