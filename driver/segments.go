package driver

import "scoria/driver/block"

// segments walks over the memory of a request.
type segments struct {
	list [][]byte
	off  int // in list[0]
}

// read fills dst from the segments; there must be enough.
func (s *segments) read(dst []byte) {
	for len(dst) > 0 {
		n := copy(dst, s.list[0][s.off:])
		dst = dst[n:]
		s.advance(n)
	}
}

// readSafely is read for memory that may fault; the goroutine has
// debug.SetPanicOnFault set.
func (s *segments) readSafely(dst []byte) (err error) {
	defer func() {
		if e := recover(); e != nil {
			err = faultError(e)
		}
	}()
	s.read(dst)
	return nil
}

// write copies src into the segments.
func (s *segments) write(src []byte) {
	for len(src) > 0 {
		n := copy(s.list[0][s.off:], src)
		src = src[n:]
		s.advance(n)
	}
}

// zero clears the next n bytes.
func (s *segments) zero(n int) {
	for n > 0 {
		p := s.list[0][s.off:]
		p = p[:min(n, len(p))]
		clear(p)
		n -= len(p)
		s.advance(len(p))
	}
}

// contiguous returns the next n bytes if they lie in one segment.
func (s *segments) contiguous(n int) []byte {
	if len(s.list) > 0 && len(s.list[0])-s.off >= n {
		return s.list[0][s.off : s.off+n]
	}
	return nil
}

func (s *segments) skip(n int) {
	for n > 0 {
		k := min(n, len(s.list[0])-s.off)
		n -= k
		s.advance(k)
	}
}

func (s *segments) advance(n int) {
	s.off += n
	for len(s.list) > 0 && s.off >= len(s.list[0]) {
		s.off -= len(s.list[0])
		s.list = s.list[1:]
	}
}

// total is the sum of the segments' lengths.
func total(list [][]byte) (n uint64) {
	for _, s := range list {
		n += uint64(len(s))
	}
	return n
}

// refusal says why a read or write is not begun: the volume is unusable, the range
// is wrong, or the front end gave another number of bytes than Length.
func refusal(info *block.Info, r *block.Request, unusable error) error {
	if unusable != nil {
		return unusable
	}
	if err := block.CheckRange(info, r); err != nil {
		return err
	}
	if total(r.Segments) != r.Length {
		return block.ErrRange
	}
	return nil
}
