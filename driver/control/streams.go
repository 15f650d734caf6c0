package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Exports and receives don't fit into one JSON object. An export's answer is the
// stream; what fails after its first byte is told in the HTTP trailer errorTrailer,
// and the stream then lacks its own trailer. A receive's request is the stream. If
// it is refused half-way, the answer comes at once, and what the client still sends
// is thrown away for a moment, so that it reads the answer before it finds the
// connection closed.

const (
	errorTrailer = "Scoria-Error"
	streamType   = "application/vnd.scoria.stream"

	// drainTime and drainBytes bound what a receive that was answered still takes.
	drainTime  = 5 * time.Second
	drainBytes = 1 << 30
)

func (s *Server) streamRoutes(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/volumes/{pool}/{name}/snapshots/{snapshot}/export", s.export)
	mux.HandleFunc("POST /v1/volumes/{pool}/{name}/receive", s.receive)
}

// lazyWriter sends the status with the first byte, so that what fails before can
// have another.
type lazyWriter struct {
	w     http.ResponseWriter
	begun bool
}

func (l *lazyWriter) Write(p []byte) (int, error) {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", streamType)
		l.w.Header().Set("Trailer", errorTrailer)
	}
	return l.w.Write(p)
}

func (s *Server) export(w http.ResponseWriter, r *http.Request) {
	req := Export{Volume: volumeName(r), Snapshot: r.PathValue("snapshot"), Since: r.URL.Query().Get("since")}
	if q := r.URL.Query().Get("start"); q != "" {
		var err error
		if req.Start, err = strconv.ParseUint(q, 10, 64); err != nil {
			s.fail(w, r, Errorf(CodeInvalid, "start %q: must be a number of bytes", q))
			return
		}
	}
	lazy := &lazyWriter{w: w}
	began := time.Now()
	switch err := s.backend.Export(r.Context(), req, lazy); {
	case err == nil:
		s.log.Info().Str("volume", req.Volume).Str("snapshot", req.Snapshot).Str("since", req.Since).Dur("took", time.Since(began)).Msg("exported")
	case !lazy.begun:
		s.fail(w, r, err)
	case r.Context().Err() != nil:
		s.log.Info().Str("volume", req.Volume).Str("snapshot", req.Snapshot).Msg("export: the client went away")
	default:
		s.log.Error().Err(err).Str("volume", req.Volume).Str("snapshot", req.Snapshot).Msg("export failed")
		text, marshalErr := json.Marshal(&Error{Code: CodeOf(err), Message: err.Error()})
		if marshalErr == nil {
			w.Header().Set(errorTrailer, string(text))
		}
	}
}

func (s *Server) receive(w http.ResponseWriter, r *http.Request) {
	resumable, err := flag(r, "resumable")
	if err != nil {
		s.fail(w, r, err)
		return
	}
	conn := http.NewResponseController(w)
	if err := conn.EnableFullDuplex(); err != nil {
		s.fail(w, r, err)
		return
	}
	got, err := s.backend.Receive(r.Context(), volumeName(r), resumable, r.Body)
	// What follows the stream's trailer, or what was refused, would be taken for the
	// next request.
	w.Header().Set("Connection", "close")
	if err == nil {
		s.log.Info().Str("volume", got.Volume).Str("snapshot", got.Snapshot.Name).Uint64("data", got.Data).Msg("received")
		s.reply(w, http.StatusOK, got)
	} else {
		s.fail(w, r, err)
	}
	if conn.Flush() == nil && conn.SetReadDeadline(time.Now().Add(drainTime)) == nil {
		_, _ = io.CopyN(io.Discard, r.Body, drainBytes)
	}
}

// Export copies the stream of a snapshot to w. It does not look into it: a stream
// package Reader does.
func (c *Client) Export(ctx context.Context, e Export, w io.Writer) error {
	q := url.Values{}
	if e.Since != "" {
		q.Set("since", e.Since)
	}
	if e.Start > 0 {
		q.Set("start", strconv.FormatUint(e.Start, 10))
	}
	path := snapshotPath(e.Volume, e.Snapshot) + "/export?" + q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://scoriad"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return readFailure(resp)
	}
	_, err = io.CopyBuffer(w, resp.Body, make([]byte, 1<<20))
	if text := resp.Trailer.Get(errorTrailer); err == nil && text != "" {
		var failure Error
		if json.Unmarshal([]byte(text), &failure) != nil {
			return errors.New(text)
		}
		return &failure
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// Receive sends a stream to be applied to a volume. An error of r ends it.
func (c *Client) Receive(ctx context.Context, volume string, resumable bool, r io.Reader) (got Received, err error) {
	path := volumePath(volume) + "/receive?resumable=" + strconv.FormatBool(resumable)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://scoriad"+path, io.NopCloser(r))
	if err != nil {
		return got, err
	}
	req.Header.Set("Content-Type", streamType)
	resp, err := c.http.Do(req)
	if err != nil {
		return got, c.explain(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return got, readFailure(resp)
	}
	return got, json.NewDecoder(io.LimitReader(resp.Body, MaxBodyBytes)).Decode(&got)
}

// readFailure turns an answer that is not a success into its error.
func readFailure(resp *http.Response) error {
	answer, err := io.ReadAll(io.LimitReader(resp.Body, MaxBodyBytes))
	if err != nil {
		return err
	}
	var failure struct{ Error *Error }
	if json.Unmarshal(answer, &failure) == nil && failure.Error != nil {
		return failure.Error
	}
	return fmt.Errorf("%s %s: the daemon answered %s", resp.Request.Method, resp.Request.URL.Path, resp.Status)
}
