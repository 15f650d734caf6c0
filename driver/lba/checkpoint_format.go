package lba

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/google/uuid"
)

// A page object holds leaf pages of one checkpoint:
//
//	 0  magic "SCLBPAGE"                                   8 bytes
//	 8  version, 1                                         4
//	12  object number, from 1 on                           4
//	16  volume UUID                                       16
//	32  n, the number of pages, 1 to MaxObjectPages        4
//	36  CRC32C of bytes 0 to 35 and of the index           4
//	40  index: per page leaf number (4), CRC32C of page (4)  8·n
//	    zeroes up to a multiple of 4096
//	 H  pages of 512 locations of 8 bytes each             4096·n
//
// All numbers are little-endian. Leaves ascend. The object ends with its last
// page. A page is read and verified on its own, given the index.
const (
	pageMagic       = "SCLBPAGE"
	pageVersion     = 1
	pageHeaderBytes = 40
	pageIndexBytes  = 8

	// ObjectPages is how many pages a builder puts into an object: about 8 MiB
	// with a header of exactly 16 KiB.
	ObjectPages = (16384 - pageHeaderBytes) / pageIndexBytes
	// MaxObjectPages is the largest number of pages that a reader accepts.
	MaxObjectPages = 1 << 16
)

// Errors of stored checkpoints.
var (
	// ErrFormat: bytes are not what they should be; the text says what.
	ErrFormat = errors.New("malformed map checkpoint")
	// ErrChecksum, a case of ErrFormat: bytes have changed since they were stored.
	ErrChecksum = fmt.Errorf("%w: checksum mismatch", ErrFormat)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var le = binary.LittleEndian

// pageObjectHeader returns H, the offset of the first of n pages.
func pageObjectHeader(n int) int {
	return (pageHeaderBytes + n*pageIndexBytes + PageBytes - 1) &^ (PageBytes - 1)
}

// PageObjectBuilder gathers pages in memory and then is the object to be
// stored: Size bytes, read by ReadAt. One goroutine at a time adds; once Size
// has been called any may read.
type PageObjectBuilder struct {
	volume uuid.UUID
	object uint32
	header []byte // sealed by Size; until then its index grows
	pages  []byte
	sealed bool
}

// NewPageObjectBuilder returns a builder for the volume's objects; Reset comes next.
func NewPageObjectBuilder(volume uuid.UUID) *PageObjectBuilder {
	return &PageObjectBuilder{volume: volume}
}

// Reset begins the object of that number, from 1 on. Its memory is used again.
func (b *PageObjectBuilder) Reset(object uint32) {
	if object == 0 {
		panic("lba: page object number 0")
	}
	b.object, b.sealed = object, false
	b.header = append(b.header[:0], make([]byte, pageHeaderBytes)...)
	b.pages = b.pages[:0]
}

// Len returns the number of pages so far.
func (b *PageObjectBuilder) Len() int { return len(b.pages) / PageBytes }

// Full reports whether the object takes no more pages.
func (b *PageObjectBuilder) Full() bool { return b.Len() >= ObjectPages }

// Add appends a copy of a leaf's page and returns its address. Leaves ascend.
func (b *PageObjectBuilder) Add(leaf uint64, page []byte) (PageAddr, error) {
	n := b.Len()
	switch {
	case b.object == 0 || b.sealed || b.Full():
		panic("lba: page added to an object that takes none")
	case len(page) != PageBytes:
		return 0, fmt.Errorf("%w: page of %d bytes: must be %d", ErrFormat, len(page), PageBytes)
	case leaf >= MaxLeaves:
		return 0, fmt.Errorf("%w: leaf %d: must be below %d", ErrFormat, leaf, uint64(MaxLeaves))
	case n > 0 && leaf <= uint64(le.Uint32(b.header[len(b.header)-pageIndexBytes:])):
		return 0, fmt.Errorf("%w: leaf %d does not ascend", ErrFormat, leaf)
	}
	b.header = le.AppendUint32(b.header, uint32(leaf))
	b.header = le.AppendUint32(b.header, crc32.Checksum(page, castagnoli))
	b.pages = append(b.pages, page...)
	return MakePageAddr(b.object, uint32(n)), nil
}

// Size completes the object, which has at least one page, and returns its length.
func (b *PageObjectBuilder) Size() int64 {
	if b.Len() == 0 {
		panic("lba: page object without pages")
	}
	if !b.sealed {
		h := b.header
		copy(h, pageMagic)
		le.PutUint32(h[8:], pageVersion)
		le.PutUint32(h[12:], b.object)
		copy(h[16:32], b.volume[:])
		le.PutUint32(h[32:], uint32(b.Len()))
		le.PutUint32(h[36:], headerCRC(h, h[pageHeaderBytes:]))
		b.header = append(h, make([]byte, pageObjectHeader(b.Len())-len(h))...)
		b.sealed = true
	}
	return int64(len(b.header) + len(b.pages))
}

// headerCRC is the checksum of the fixed part before the checksum and the index.
func headerCRC(fixed, index []byte) uint32 {
	return crc32.Update(crc32.Checksum(fixed[:36], castagnoli), castagnoli, index)
}

// ReadAt implements io.ReaderAt on the completed object.
func (b *PageObjectBuilder) ReadAt(p []byte, off int64) (n int, err error) {
	if !b.sealed {
		panic("lba: page object read before Size")
	}
	if off < 0 {
		return 0, fmt.Errorf("read page object at %d: negative offset", off)
	}
	if off < int64(len(b.header)) {
		n = copy(p, b.header[off:])
	}
	if at := off + int64(n) - int64(len(b.header)); at >= 0 && at < int64(len(b.pages)) {
		n += copy(p[n:], b.pages[at:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// PageObject is the verified header of a stored page object, 8 bytes per page.
// Safe from any goroutine.
type PageObject struct {
	object uint32
	index  []byte
}

// OpenPageObject reads and verifies the header of an object of size bytes. It
// fails with ErrFormat if that is not the volume's object of that number.
func OpenPageObject(r io.ReaderAt, size int64, volume uuid.UUID, object uint32) (*PageObject, error) {
	o, err := openPageObject(r, size, volume, object)
	if err != nil {
		return nil, fmt.Errorf("open map page object %d: %w", object, err)
	}
	return o, nil
}

func openPageObject(r io.ReaderAt, size int64, volume uuid.UUID, object uint32) (*PageObject, error) {
	if size < 2*PageBytes || size%PageBytes != 0 {
		return nil, fmt.Errorf("%w: %d bytes: must be a multiple of %d, at least two of them", ErrFormat, size, PageBytes)
	}
	head := make([]byte, PageBytes)
	if err := readFull(r, head, 0); err != nil {
		return nil, err
	}
	n := le.Uint32(head[32:])
	switch {
	case string(head[:8]) != pageMagic:
		return nil, fmt.Errorf("%w: magic %q: must be %q", ErrFormat, head[:8], pageMagic)
	case le.Uint32(head[8:]) != pageVersion:
		return nil, fmt.Errorf("%w: version %d: must be %d", ErrFormat, le.Uint32(head[8:]), pageVersion)
	case le.Uint32(head[12:]) != object:
		return nil, fmt.Errorf("%w: object number %d: must be %d", ErrFormat, le.Uint32(head[12:]), object)
	case uuid.UUID(head[16:32]) != volume:
		return nil, fmt.Errorf("%w: volume %v: must be %v", ErrFormat, uuid.UUID(head[16:32]), volume)
	case n == 0 || n > MaxObjectPages:
		return nil, fmt.Errorf("%w: %d pages: must be 1 to %d", ErrFormat, n, MaxObjectPages)
	}
	if want := int64(pageObjectHeader(int(n))) + int64(n)*PageBytes; size != want {
		return nil, fmt.Errorf("%w: %d bytes: %d pages need %d", ErrFormat, size, n, want)
	}
	index := make([]byte, n*pageIndexBytes)
	if rest := index[copy(index, head[pageHeaderBytes:]):]; len(rest) > 0 {
		if err := readFull(r, rest, PageBytes); err != nil {
			return nil, err
		}
	}
	if headerCRC(head, index) != le.Uint32(head[36:]) {
		return nil, fmt.Errorf("header: %w", ErrChecksum)
	}
	o := &PageObject{object: object, index: index}
	for i := range n {
		if leaf := o.Leaf(i); leaf >= MaxLeaves || i > 0 && leaf <= o.Leaf(i-1) {
			return nil, fmt.Errorf("%w: page %d: leaf %d does not ascend below %d", ErrFormat, i, leaf, uint64(MaxLeaves))
		}
	}
	return o, nil
}

// readFull fills p, whatever the reader says at its end.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}

// Pages returns the number of pages.
func (o *PageObject) Pages() int { return len(o.index) / pageIndexBytes }

// Leaf returns the leaf whose page has that index, which is below Pages.
func (o *PageObject) Leaf(index uint32) uint64 {
	return uint64(le.Uint32(o.index[index*pageIndexBytes:]))
}

// Sums returns the CRC32C of each PageBytes of the object, header and pages, without
// reading the pages: the verified index has theirs. r reads the object.
func (o *PageObject) Sums(r io.ReaderAt) ([]uint32, error) {
	header := make([]byte, pageObjectHeader(o.Pages()))
	if err := readFull(r, header, 0); err != nil {
		return nil, fmt.Errorf("sums of map page object %d: %w", o.object, err)
	}
	if !bytes.Equal(header[pageHeaderBytes:][:len(o.index)], o.index) {
		return nil, fmt.Errorf("sums of map page object %d: index has changed: %w", o.object, ErrChecksum)
	}
	sums := make([]uint32, 0, len(header)/PageBytes+o.Pages())
	for ; len(header) > 0; header = header[PageBytes:] {
		sums = append(sums, crc32.Checksum(header[:PageBytes], castagnoli))
	}
	for i := range o.Pages() {
		sums = append(sums, le.Uint32(o.index[i*pageIndexBytes+4:]))
	}
	return sums, nil
}

// ReadPage fills page, PageBytes long, from r, which reads the object, and
// verifies it. It fails with ErrFormat if there is no such page and with
// ErrChecksum if it is damaged; page then holds anything.
func (o *PageObject) ReadPage(r io.ReaderAt, index uint32, page []byte) error {
	if uint64(index) >= uint64(o.Pages()) || len(page) != PageBytes {
		return fmt.Errorf("read map page %v into %d bytes: %w: the object has %d pages of %d bytes",
			MakePageAddr(o.object, index), len(page), ErrFormat, o.Pages(), PageBytes)
	}
	off := int64(pageObjectHeader(o.Pages())) + int64(index)*PageBytes
	if err := readFull(r, page, off); err != nil {
		return fmt.Errorf("read map page %v: %w", MakePageAddr(o.object, index), err)
	}
	if crc32.Checksum(page, castagnoli) != le.Uint32(o.index[index*pageIndexBytes+4:]) {
		return fmt.Errorf("read map page %v: %w", MakePageAddr(o.object, index), ErrChecksum)
	}
	return nil
}
