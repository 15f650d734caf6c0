package lba

import (
	"context"
	"errors"
	"io"
	"iter"

	"github.com/google/uuid"
)

// ErrFormat: bytes are not what they should be; the text says what.
var ErrFormat = errors.New("malformed map checkpoint")

// PageObjectBuilder collects pages in memory and is the object to be stored (io.ReaderAt, Size).
type PageObjectBuilder struct{}

func NewPageObjectBuilder(volume uuid.UUID) *PageObjectBuilder              { panic("x") }
func (b *PageObjectBuilder) Reset(object uint32)                            { panic("x") }
func (b *PageObjectBuilder) Len() int                                       { panic("x") }
func (b *PageObjectBuilder) Full() bool                                     { panic("x") }
func (b *PageObjectBuilder) Add(leaf uint64, page []byte) (PageAddr, error) { panic("x") }
func (b *PageObjectBuilder) Size() int64                                    { panic("x") }
func (b *PageObjectBuilder) ReadAt(p []byte, off int64) (int, error)        { panic("x") }

// PageObject is the verified header of a stored page object.
type PageObject struct{}

func OpenPageObject(r io.ReaderAt, size int64, volume uuid.UUID, object uint32) (*PageObject, error) {
	panic("x")
}
func (o *PageObject) Pages() int                                              { panic("x") }
func (o *PageObject) Leaf(index uint32) uint64                                { panic("x") }
func (o *PageObject) ReadPage(r io.ReaderAt, index uint32, page []byte) error { panic("x") }

// ObjectReader is a PageReader over stored page objects; it caches their headers.
type ObjectReader struct{}

func NewObjectReader(volume uuid.UUID, open func(ctx context.Context, object uint32) (r io.ReaderAt, size int64, err error)) *ObjectReader {
	panic("x")
}
func (o *ObjectReader) ReadPage(ctx context.Context, addr PageAddr, page []byte) error { panic("x") }
func (o *ObjectReader) Forget(object uint32)                                           {}

// Root is the root object of a checkpoint.
type Root struct {
	Volume    uuid.UUID
	Sequence  uint64 // of the checkpoint, from 1 on
	LogSCO    uint64 // log position: SCO number …
	LogRecord uint64 // … and record index within it
	Clusters  uint64 // of the volume
	Mapped    uint64 // clusters
	Blob      []byte // the driver's own, opaque
	Directory iter.Seq2[uint64, PageAddr]
}

func (r *Root) Encode(w io.Writer) error                { panic("x") }
func DecodeRoot(b []byte) (*Root, error)                { panic("x") }
func ReadRoot(r io.ReaderAt, size int64) (*Root, error) { panic("x") }
