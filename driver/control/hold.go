package control

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
)

// A client that makes something for the time of an operation only, the volume of an
// import or the snapshot of an export, keeps a hold meanwhile: a request that stays
// open. What is made with the hold's name as Owner is undone when the connection ends
// before the client has completed or deleted it: a client that is killed can't.

// Hold is the answer to the request that stays open.
type Hold struct {
	Owner string `json:"owner"` // for CreateVolume and CreateSnapshot
}

// HoldBackend is what the server asks of its daemon about holds. Its methods don't
// block.
type HoldBackend interface {
	// BeginHold returns the name of a new hold.
	BeginHold() (owner string)
	// EndHold says that the hold's client is gone, or done. What was made under it
	// and is still unfinished is undone, soon.
	EndHold(owner string)
}

// hold answers at once, and ends with the client or the server.
func (s *Server) hold(w http.ResponseWriter, r *http.Request) {
	owner := s.backend.BeginHold()
	defer s.backend.EndHold(owner)
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(Hold{owner}); err != nil {
		return
	}
	if err := http.NewResponseController(w).Flush(); err != nil {
		return
	}
	select {
	case <-r.Context().Done():
	case <-s.ending.Done():
	}
}

// Hold makes what is created with owner go if this process does. release ends it:
// after what was made has been completed or deleted. ctx bounds the request for it
// only.
func (c *Client) Hold(ctx context.Context) (owner string, release func(), err error) {
	open, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	defer func() {
		if !stop() && err == nil { // ctx has ended, and the request ends with it
			owner, release, err = "", nil, ctx.Err()
		}
		if err != nil {
			cancel()
		}
	}()
	req, err := http.NewRequestWithContext(open, http.MethodPost, "http://scoriad/v1/hold", nil)
	if err != nil {
		return "", nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", nil, c.explain(ctx, err)
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return "", nil, readFailure(resp)
	}
	var h Hold
	if err := json.NewDecoder(io.LimitReader(resp.Body, MaxBodyBytes)).Decode(&h); err != nil {
		return "", nil, errors.Join(c.explain(ctx, err), resp.Body.Close())
	}
	return h.Owner, func() {
		cancel()
		resp.Body.Close()
	}, nil
}
